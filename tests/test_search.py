"""Several texts per prompt: beams against transformers', samples, the best of several, and drafts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SIZES, jax_model, random_ids, random_jax_model, relative, torch_model

from mamba2_jax import Mamba2Config, generate
from mamba2_jax.generation.drafts import Guesses, PromptLookup, TokenHistory
from mamba2_jax.generation.speculative import accept

NEW = 12
HYBRID = Mamba2Config(**SIZES).replace(
    attn_layer_idx=(1,), attn_cfg={"num_heads": 4, "head_dim": 8, "d_conv": 4}
)


@pytest.fixture(scope="module")
def model():
    return jax_model()


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, 9)


def assert_has_read(model, ids, out, copies: int = 1):
    """The state is that after each prompt and exactly the tokens of its rows."""
    padded, mask = np.zeros((2, len(out.tokens), 32), int)
    for row, length in enumerate(out.lengths.tolist()):
        read = [*ids[row // copies], *out.tokens[row, :length].tolist()]
        padded[row, : len(read)], mask[row, : len(read)] = read, 1
    want = model(padded, mask).cache
    np.testing.assert_array_equal(out.cache.position, want.position)
    for mine, other in zip(jax.tree.leaves(out.cache.ssm), jax.tree.leaves(want.ssm), strict=True):
        assert relative(mine, other) < 1e-5


class TestBeams:
    @pytest.mark.parametrize(
        ("options", "eos"),
        [
            ({"num_beams": 3, "early_stopping": True, "repetition_penalty": 1.3}, (5, 40, 61)),
            ({"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0}, (40, 61)),
            ({"num_beams": 4, "num_return_sequences": 4, "length_penalty": -1.0}, (5, 40, 61, 7, 90)),
        ],
        ids=str,
    )
    def test_sequences_and_scores_are_those_of_transformers(self, model, ids, options, eos):
        torch = pytest.importorskip("torch")
        want = torch_model().generate(
            torch.tensor(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=list(np.atleast_1d(eos)) or None,
            pad_token_id=3,  # not 0, which transformers takes for none
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        got = generate(model, ids, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=3, **options)
        tokens = want.sequences[:, 9:].numpy()
        np.testing.assert_array_equal(got.tokens[:, : tokens.shape[1]], tokens)
        assert (got.tokens[:, tokens.shape[1] :] == 3).all()
        np.testing.assert_allclose(got.scores, want.sequences_scores, rtol=1e-5)
        if np.size(eos) > 2:
            assert got.lengths.min() < NEW  # some text did end
        assert_has_read(model, ids, got, options.get("num_return_sequences", 1))

    def test_the_padding_of_the_vocabulary_is_left_out(self, model, ids):
        got = generate(model, ids, max_new_tokens=4, num_beams=2, eos_token_id=(), vocab_size=20)
        assert (got.tokens < 20).all()


class TestSeveralTexts:
    options = {"temperature": 1.5, "top_k": 20, "key": jax.random.key(1), "eos_token_id": 5}

    def test_each_text_has_its_own_key_and_state(self, model, ids):
        new = generate(model, ids, max_new_tokens=NEW, num_return_sequences=3, **self.options)
        assert new.tokens.shape == (6, NEW)
        assert len({tuple(row) for row in new.tokens.tolist()}) == 6
        assert_has_read(model, ids, new, 3)

    def test_the_best_of_several_have_the_highest_mean_logprob(self, model, ids):
        every = generate(
            model, ids, max_new_tokens=NEW, num_return_sequences=5, return_logprobs=True, **self.options
        )
        best = generate(model, ids, max_new_tokens=NEW, num_return_sequences=2, best_of=5, **self.options)
        means = (np.asarray(every.logprobs).sum(1) / every.lengths).reshape(2, 5)
        order = np.argsort(-means, axis=1)[:, :2]
        np.testing.assert_allclose(best.scores.reshape(2, 2), np.take_along_axis(means, order, 1), rtol=1e-6)
        rows = (order + [[0], [5]]).reshape(-1)
        np.testing.assert_array_equal(best.tokens, every.tokens[rows])
        assert best.logprobs is None
        assert_has_read(model, ids, best, 2)


@pytest.fixture(scope="module")
def drafts(model):
    # the same but for its last norm: guesses that are sometimes right
    near = nnx.clone(model)
    norm = near.backbone.norm_f.weight
    norm[...] = norm[...] * jnp.linspace(0.5, 1.5, norm.shape[0])
    return {"itself": model, "another": near, "lookup": PromptLookup()}


@pytest.fixture(scope="module")
def prompts():
    ids = np.tile(random_ids(2, 4), 4)  # something to look up
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


class TestDrafts:
    @pytest.mark.parametrize(("name", "penalty"), [("itself", None), ("another", 1.4), ("lookup", 1.4)])
    def test_a_greedy_text_is_the_same(self, model, drafts, prompts, name, penalty):
        ids, mask = prompts
        free = generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=(), repetition_penalty=penalty)
        options = {"eos_token_id": int(free.tokens[0, 6]), "repetition_penalty": penalty}
        options |= {"max_new_tokens": NEW, "return_logprobs": True, "pad_token_id": 0}
        want = generate(model, ids, mask, **options)
        got = generate(model, ids, mask, draft=drafts[name], num_draft_tokens=3, **options)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.lengths, want.lengths)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
        for mine, other in zip(jax.tree.leaves(got.cache), jax.tree.leaves(want.cache), strict=True):
            assert relative(mine, other) < 1e-5
        if name == "itself":
            np.testing.assert_array_equal(got.passes, -(-(got.lengths - 1) // 4))
        else:
            assert (got.passes <= got.lengths - 1).all()

    def test_lookup_finds_what_the_prompt_repeats(self, model, prompts):
        forced = np.asarray(prompts[0][1, :4])

        def repeat(tokens, count, logits):
            return jnp.where(jnp.arange(96) == jnp.asarray(forced)[count % 4], 100.0, logits)

        got = generate(
            model,
            prompts[0][1:],
            max_new_tokens=NEW + 1,
            eos_token_id=(),
            logits_processors=[repeat],
            draft=PromptLookup(),
            num_draft_tokens=3,
        )
        np.testing.assert_array_equal(got.tokens[0], np.tile(forced, 4)[: NEW + 1])
        assert got.passes.tolist() == [NEW // 4]

    def test_a_hybrid_goes_back_in_its_keys_too(self):
        model, ids = random_jax_model(HYBRID), random_ids(2, 7)
        want = generate(model, ids, max_new_tokens=NEW, eos_token_id=())
        got = generate(model, ids, max_new_tokens=NEW, eos_token_id=(), draft=PromptLookup(1))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        more = random_ids(2, 3, seed=1)
        assert relative(model(more, cache=got.cache).logits, model(more, cache=want.cache).logits) < 1e-5

    def test_sampled_texts_keep_to_the_filters_and_rows_to_their_keys(self, model, drafts, prompts):
        options = {"temperature": 1.3, "top_k": 4, "key": jax.random.key(2), "eos_token_id": ()}
        options |= {"draft": drafts["another"], "num_draft_tokens": 3, "max_new_tokens": NEW}
        both = generate(model, prompts[0], num_return_sequences=2, **options)
        assert_has_read(model, prompts[0], both, 2)
        assert len({tuple(row) for row in both.tokens.tolist()}) == 4
        logits = np.asarray(model(np.concatenate([prompts[0].repeat(2, 0), both.tokens], 1)).logits)[:, 15:-1]
        fourth = np.sort(logits, axis=-1)[..., -4]
        chosen = np.take_along_axis(logits, np.asarray(both.tokens)[..., None], -1)[..., 0]
        assert (chosen >= fourth - 1e-4).all()  # the rounding of another order of sums

    @pytest.mark.parametrize("name", ["itself", "lookup"])
    def test_it_goes_on_with_what_was_read_before(self, model, drafts, prompts, name):
        ids, mask = prompts
        draft, options = drafts[name], {"max_new_tokens": NEW, "eos_token_id": (), "num_draft_tokens": 3}
        first = generate(model, ids, mask, draft=draft, **options)
        more = random_ids(2, 3, seed=4)
        want = generate(model, more, cache=first.cache, **options)
        went_on = {"cache": first.cache, "draft": draft, "draft_cache": first.draft_cache}
        seeing = generate(model, more, **went_on, **options)
        np.testing.assert_array_equal(seeing.tokens, want.tokens)
        read = [*ids[0, 3:], *first.tokens[0].tolist(), *more[0], *seeing.tokens[0].tolist()]
        if name == "itself":
            with pytest.warns(UserWarning, match="draft has not seen what cache has read"):
                blind = generate(model, more, cache=first.cache, draft=draft, **options)
            np.testing.assert_array_equal(blind.tokens, want.tokens)
            assert seeing.passes.tolist() == [-(-(NEW - 1) // 4)] * 2  # every guess is right
            assert (blind.passes > seeing.passes).any()
            for mine in (seeing.cache, seeing.draft_cache):
                for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(want.cache), strict=True):
                    assert relative(one, other) < 1e-5
        else:
            history = seeing.draft_cache
            assert history.tokens[0, : int(history.lengths[0])].tolist() == read

    def test_lookup_finds_what_was_read_before(self, model, prompts):
        forced = np.asarray(prompts[0][1, :4])

        def repeat(tokens, count, logits):
            return jnp.where(jnp.arange(96) == jnp.asarray(forced)[count % 4], 100.0, logits)

        options = {"draft": PromptLookup(), "num_draft_tokens": 3, "eos_token_id": ()}
        first = generate(model, prompts[0][1:], max_new_tokens=1, **options)
        got = generate(
            model,
            forced[None, -1:],
            max_new_tokens=5,
            cache=first.cache,
            draft_cache=first.draft_cache,
            logits_processors=[repeat],
            **options,
        )
        np.testing.assert_array_equal(got.tokens[0], [*forced, forced[0]])
        assert got.passes.tolist() == [1]

    @pytest.mark.parametrize("sure", [False, True], ids=["drawn", "looked up"])
    def test_accepted_and_replaced_tokens_follow_the_models_distribution(self, sure):
        count, vocab = 10_000, 5
        p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, vocab)))
        q = jax.nn.softmax(2 * jax.random.normal(jax.random.key(1), (2, vocab)))
        q = jax.nn.one_hot(jnp.array([1, 3]), vocab) if sure else q
        tokens = jax.random.categorical(jax.random.key(2), jnp.log(q), shape=(count, 2))
        guesses = Guesses(tokens, jnp.broadcast_to(q, (count, 2, vocab)), None)
        keys = jax.random.split(jax.random.key(3), count)
        accepted, token = accept(jnp.broadcast_to(p, (count, 3, vocab)), guesses, keys)
        written = np.where(np.arange(3) < accepted[:, None], np.pad(tokens, ((0, 0), (0, 1))), token[:, None])
        for position in range(3):
            there = written[np.asarray(accepted) >= position, position]
            observed = np.bincount(there, minlength=vocab) / len(there)
            want = np.asarray(p[position])
            # five standard deviations of a share among so many draws
            assert (np.abs(observed - want) <= 5 * np.sqrt(want * (1 - want) / len(there))).all()
        overlap = float(jnp.minimum(p[0], q[0]).sum())
        assert abs(float((accepted > 0).mean()) - overlap) < 5 * np.sqrt(0.25 / count)


BAD = {
    "beams": ({"num_beams": 0}, "num_beams=0"),
    "beams and sampling": (
        {"num_beams": 2, "temperature": 1.0, "key": jax.random.key(0)},
        "num_beams=2 does not go with temperature",
    ),
    "beams and logprobs": ({"num_beams": 2, "return_logprobs": True}, "does not go with return_logprobs"),
    "more texts than beams": ({"num_beams": 2, "num_return_sequences": 3}, "=3 is above num_beams=2"),
    "early stopping": ({"num_beams": 2, "early_stopping": "maybe"}, "early_stopping='maybe'"),
    "length penalty": ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
    "greedy copies": ({"num_return_sequences": 2}, "greedy texts of a prompt would be the same"),
    "best of too few": ({"num_return_sequences": 3, "best_of": 2}, "best_of=2 is less"),
    "draft": ({"draft": "a path"}, "draft wants a Mamba2ForCausalLM or PromptLookup"),
    "draft tokens": ({"draft": PromptLookup(), "num_draft_tokens": 0}, "num_draft_tokens=0"),
    "processor": ({"logits_processors": [3]}, "logits_processors holds 3"),
    "one processor": ({"logits_processors": len}, "logits_processors is one function"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(model, ids, name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=f"^generate: .*{message}"):
        generate(model, ids, max_new_tokens=2, **change)


def test_a_draft_of_another_vocabulary_or_with_embeddings_is_refused(model, ids):
    with pytest.raises(ValueError, match="the draft's vocab_size=64 is not the model's 96"):
        generate(model, ids, max_new_tokens=2, draft=random_jax_model(model.config.replace(vocab_size=64)))
    embeds = model.backbone.embeddings(jnp.asarray(ids), dtype=model.dtype)
    with pytest.raises(ValueError, match="a draft reads input_ids"):
        generate(model, inputs_embeds=embeds, max_new_tokens=2, draft=PromptLookup())
    history = TokenHistory(np.ones((1, 4), np.int32), np.array([4], np.int32))
    for options, message in (
        ({"draft_cache": history}, "draft_cache needs draft"),
        (
            {"draft_cache": history, "draft": model},
            "draft_cache is a TokenHistory; a draft Mamba2ForCausalLM",
        ),
        ({"draft_cache": history, "draft": PromptLookup()}, "draft_cache has 1 rows, the prompts have 2"),
    ):
        with pytest.raises(ValueError, match=f"^generate: {message}"):
            generate(model, ids, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="PromptLookup: ngram=0"):
        PromptLookup(0)
