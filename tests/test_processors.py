"""Functions on the logits inside the loop: bans, forced beginnings, ends, automata, one's own."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import SIZES, random_ids, random_jax_model

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, generate, load_tokenizer, stream
from mamba2_jax.generation import PromptLookup
from mamba2_jax.generation.constraints import ban_words, match_json_schema, match_regex
from mamba2_jax.generation.decoding import _generate
from mamba2_jax.generation.processors import (
    ban_tokens,
    end_after,
    follow_automaton,
    force_tokens,
    penalize_repeats,
)

NEW = 12


@pytest.fixture(scope="module")
def model():
    return random_jax_model(Mamba2Config(**SIZES))


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, 9)


@pytest.fixture(scope="module")
def free(model, ids):
    return np.asarray(generate(model, ids, max_new_tokens=NEW, eos_token_id=()).tokens)


def test_banned_tokens_are_the_next_best_and_others_compile_nothing_anew(model, ids, free):
    banned = free[:, 0]
    new = generate(model, ids, max_new_tokens=NEW, eos_token_id=(), logits_processors=[ban_tokens(banned)])
    assert not np.isin(new.tokens, banned).any()
    logits = np.array(model(ids).logits[:, -1])
    logits[:, banned] = -np.inf
    np.testing.assert_array_equal(new.tokens[:, 0], logits.argmax(1))
    compiled = _generate._cache_size()
    generate(model, ids, max_new_tokens=NEW, eos_token_id=(), logits_processors=[ban_tokens([3, 4])])
    assert _generate._cache_size() == compiled


@pytest.mark.parametrize(
    "penalties", [{"presence": 1.5}, {"frequency": 0.7}, {"presence": -2.0, "frequency": 1.0}]
)
def test_repeats_cost_what_the_penalties_say(model, ids, free, penalties):
    """Choose each token again from the logits of one pass over prompt and new text, and the counts so far."""
    new = generate(
        model, ids, max_new_tokens=NEW, eos_token_id=(), logits_processors=[penalize_repeats(**penalties)]
    )
    tokens = np.asarray(new.tokens)
    assert (tokens != free).any()
    logits = np.array(model(np.concatenate([ids, tokens], 1)).logits[:, ids.shape[1] - 1 : -1])
    for row in range(2):
        for at in range(NEW):
            counts = np.bincount(tokens[row, :at], minlength=logits.shape[-1])
            cost = penalties.get("presence", 0) * (counts > 0) + penalties.get("frequency", 0) * counts
            assert (logits[row, at] - cost).argmax() == tokens[row, at]


def test_a_penalty_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="presence=nan must be a finite number"):
        penalize_repeats(presence=float("nan"))


def test_forced_tokens_begin_the_text_and_an_end_follows_words(model, ids):
    words = [11, 12, 13]
    processors = [force_tokens([20, *words]), end_after(words, 7)]
    for options in ({}, {"num_beams": 2}, {"temperature": 1.0, "key": jax.random.key(0)}):
        new = generate(
            model, ids, max_new_tokens=NEW, eos_token_id=7, logits_processors=processors, **options
        )
        np.testing.assert_array_equal(new.tokens[:, :5], [[20, *words, 7]] * 2)
        assert new.lengths.tolist() == [5, 5]


def test_a_function_of_ones_own_sees_the_new_tokens_and_their_count(model, ids, free):
    def climb(tokens, count, logits):
        last = tokens[:, jnp.maximum(count - 1, 0)]
        smaller = jnp.arange(logits.shape[-1]) <= last[:, None]
        return jnp.where(smaller & (count > 0), -jnp.inf, logits)

    new = generate(model, ids, max_new_tokens=4, eos_token_id=(), logits_processors=[climb])
    assert (np.diff(new.tokens, axis=1) > 0).all()
    np.testing.assert_array_equal(new.tokens[:, 0], free[:, 0])
    before = generate(model, ids, max_new_tokens=4, logits_processors=[climb], repetition_penalty=5.0)
    assert (np.diff(before.tokens, axis=1) > 0).all()


def test_an_automaton_allows_its_texts_alone(model, ids):
    # an even number of 30s between a 10 and the end
    transitions = {5: {10: 6}, 6: {30: 9}, 9: {30: 6}}
    processor = follow_automaton(transitions, 5, [6], vocab_size=96, eos=2)
    options = {"temperature": 1.0, "key": jax.random.key(1), "logits_processors": [processor]}
    new = generate(model, ids, max_new_tokens=40, eos_token_id=2, num_return_sequences=4, **options)
    for row, length in zip(new.tokens.tolist(), new.lengths.tolist(), strict=True):
        assert row[0] == 10
        assert set(row[1 : length - 1]) <= {30}
        if row[length - 1] == 2:
            assert length % 2 == 0
    assert len(set(new.lengths.tolist())) > 1


@pytest.mark.parametrize("make", [ban_tokens, force_tokens, lambda ids: end_after(ids, 2)])
@pytest.mark.parametrize("ids", [[], [-1], [0.5], 3], ids=repr)
def test_what_are_no_ids_is_named(make, ids):
    with pytest.raises(ValueError, match="wants a list of token ids, at least one"):
        make(ids)


@pytest.fixture(scope="module")
def embedded():
    return Mamba2ForCausalLM.from_pretrained(dtype="float32"), load_tokenizer()


class TestConstraints:
    sampled = {"temperature": 1.0, "key": jax.random.key(0)}

    def test_a_banned_word_does_not_occur_however_it_is_cut(self, embedded):
        model, tokenizer = embedded
        words = ["abab", "bac", "é"]
        processor = ban_words(model, tokenizer, words)
        table = np.asarray(processor.args[0])
        rng = np.random.default_rng(0)
        texts = ["".join(rng.choice(list("abcé "), 6)) for _ in range(200)]
        cut = [[*tokenizer.encode(text[:3]), *tokenizer.encode(text[3:])] for text in texts]
        banned = 0
        for text, tokens in zip(texts, cut, strict=True):
            state = 0
            for token in tokens:
                state = -1 if state < 0 else table[state, token]
            assert (state < 0) == any(word in text for word in words)
            banned += state < 0
        assert 20 < banned < 180
        free = "".join(stream(model, tokenizer, "x = ", max_new_tokens=12))
        word = free[2:4]
        processor = ban_words(model, tokenizer, [word])
        text = "".join(stream(model, tokenizer, "x = ", max_new_tokens=12, logits_processors=[processor]))
        assert word in free
        assert word not in text

    def test_a_text_matches_a_regular_expression(self, embedded):
        model, tokenizer = embedded
        processor = match_regex(model, tokenizer, r"(ab|é{2}c)+;")
        options = {**self.sampled, "max_new_tokens": 40, "logits_processors": [processor]}
        text = "".join(stream(model, tokenizer, "x = ", **options))
        assert re.fullmatch("(ab|é{2}c)+;", text)
        assert "".join(stream(model, tokenizer, "x = ", draft=PromptLookup(1), **options)).endswith(";")

    def test_a_text_is_json_of_a_schema(self, embedded):
        model, tokenizer = embedded
        schema = {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer"}},
            "required": ["name", "size"],
        }
        processor = match_json_schema(model, tokenizer, schema)
        options = {**self.sampled, "max_new_tokens": 60, "logits_processors": [processor]}
        text = "".join(stream(model, tokenizer, "x = ", **options))
        assert set(json.loads(text)) == {"name", "size"}

    def test_what_cannot_be_followed_is_told(self, embedded, monkeypatch):
        for words in ([], [""], "word", [3]):
            with pytest.raises(ValueError, match="ban_words: wants a list of words"):
                ban_words(*embedded, words)
        with pytest.raises(ValueError, match=r"match_regex: '\(a' cannot be followed"):
            match_regex(*embedded, "(a")
        for schema in ("{", '{"type": "nonsense"}', {"type": object}):
            with pytest.raises(ValueError, match="match_json_schema: the schema cannot be followed"):
                match_json_schema(*embedded, schema)
        monkeypatch.setitem(sys.modules, "outlines_core", None)
        with pytest.raises(ImportError, match="needs outlines-core: pip install"):
            match_regex(*embedded, "a")
