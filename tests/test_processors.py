"""Functions on the logits inside the loop: bans, forced beginnings, ends, automata, one's own."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import SIZES, random_ids, random_jax_model

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, generate, load_tokenizer, stream
from mamba2_jax.generation.decoding import _generate
from mamba2_jax.generation.processors import ban_tokens, end_after, follow_automaton, force_tokens

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


def test_a_json_schema_by_outlines_core():
    """The README's example: outlines-core turns a schema into an automaton over the tokenizer's ids."""
    outlines_core = pytest.importorskip("outlines_core")
    model, tokenizer = Mamba2ForCausalLM.from_pretrained(dtype="float32"), load_tokenizer()
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer"}},
        "required": ["name", "size"],
    }
    pattern = outlines_core.json_schema.build_regex_from_schema(json.dumps(schema))
    end = tokenizer.eos_token_id
    words = {}  # the tokens' bytes by GPT-2's table, as the tokenizer's file has them
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if token not in tokenizer.all_special_ids and text and "\ufffd" not in text:
            words.setdefault(text, []).append(token)
    index = outlines_core.Index(pattern, outlines_core.Vocabulary(end, words))
    processor = follow_automaton(
        index.get_transitions(),
        index.get_initial_state(),
        index.get_final_states(),
        vocab_size=model.config.vocab_size,
        eos=end,
    )
    options = {"temperature": 1.0, "key": jax.random.key(0), "max_new_tokens": 60}
    text = "".join(stream(model, tokenizer, "x = ", logits_processors=[processor], **options))
    assert re.fullmatch(pattern, text)
    assert set(json.loads(text)) == {"name", "size"}
