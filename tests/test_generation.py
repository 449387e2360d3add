"""Generation: PyTorch's tokens, exact rows, one program for many lengths, and what bad input gets."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SIZES, jax_model, random_ids, relative, torch_model

from mamba2_jax import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, generate
from mamba2_jax.generation.decoding import _generate
from mamba2_jax.generation.loop import decode
from mamba2_jax.generation.sampling import make_sampler
from mamba2_jax.generation.state import start_state

EXPECTED = json.loads((pathlib.Path(__file__).parent / "data" / "expected_greedy.json").read_text())
NEW = 12


@pytest.fixture(scope="module")
def model():
    return Mamba2ForCausalLM(Mamba2Config(**SIZES), rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, 9)


@pytest.fixture(scope="module")
def greedy(model, ids):
    return generate(model, ids, max_new_tokens=NEW, eos_token_id=(), return_logprobs=True)


@pytest.fixture(scope="module")
def embedded():
    return Mamba2ForCausalLM.from_pretrained(dtype="float32")


class TestAgainstPyTorch:
    @pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: repr(case["prompt"][:20]))
    def test_the_embedded_model_writes_what_transformers_writes(self, embedded, case):
        new = generate(embedded, [case["input_ids"]], max_new_tokens=len(case["new_tokens"]), eos_token_id=())
        assert new.tokens[0].tolist() == case["new_tokens"]
        last = embedded(np.array([case["input_ids"]])).logits[0, -1]
        for token, logit in case["last_prompt_logits_top5"]:
            assert abs(float(last[token]) - logit) < 1e-4

    @pytest.mark.parametrize("penalty", [None, 1.5])
    def test_a_random_model_greedily(self, penalty):
        torch = pytest.importorskip("torch")
        ids = random_ids(2, 9)
        options = {} if penalty is None else {"repetition_penalty": penalty}
        want = torch_model().generate(
            torch.tensor(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            **options,
        )
        got = generate(jax_model(), ids, max_new_tokens=NEW, eos_token_id=(), **options)
        np.testing.assert_array_equal(got.tokens, want[:, 9:])


class TestRows:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_ragged_batch_writes_what_each_row_writes_alone(self, model, ids, greedy, side):
        padded, mask = np.zeros((2, 14), int), np.zeros((2, 14), int)
        for row, length in enumerate((9, 4)):
            place = slice(14 - length, 14) if side == "left" else slice(0, length)
            padded[row, place], mask[row, place] = ids[row, :length], 1
        new = generate(model, padded, mask, max_new_tokens=NEW, eos_token_id=())
        np.testing.assert_array_equal(new.tokens[0], greedy.tokens[0])
        alone = generate(model, ids[1:, :4], max_new_tokens=NEW, eos_token_id=())
        np.testing.assert_array_equal(new.tokens[1], alone.tokens[0])
        assert new.cache.position.tolist() == [9 + NEW, 4 + NEW]
        for mine, other in zip(jax.tree.leaves(new.cache[1]), jax.tree.leaves(alone.cache), strict=True):
            assert relative(mine, other) < 1e-5

    def test_a_row_that_ends_is_padded_and_frozen(self, model, ids, greedy):
        tokens = np.asarray(greedy.tokens)
        eos = int(tokens[0, 4])
        end = int(np.flatnonzero(tokens[0] == eos)[0]) + 1
        assert eos not in tokens[1]
        new = generate(model, ids, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=7)
        assert new.lengths.tolist() == [end, NEW]
        np.testing.assert_array_equal(new.tokens[0, :end], tokens[0, :end])
        assert (new.tokens[0, end:] == 7).all()
        np.testing.assert_array_equal(new.tokens[1], tokens[1])
        read = np.concatenate([ids[:1], tokens[:1, :end]], 1)
        for mine, other in zip(
            jax.tree.leaves(new.cache[0]), jax.tree.leaves(model(read).cache), strict=True
        ):
            assert relative(mine, other) < 1e-5

    def test_several_ends_and_the_configs_own(self, model, ids, greedy):
        tokens = np.asarray(greedy.tokens)
        ends = (int(tokens[0, 3]), int(tokens[1, 5]))
        new = generate(model, ids, max_new_tokens=NEW, eos_token_id=ends)
        first = [int(np.isin(row, ends).argmax()) + 1 for row in tokens]
        assert new.lengths.tolist() == first
        same = Mamba2ForCausalLM(model.config.replace(eos_token_id=ends), rngs=nnx.Rngs(1))
        assert generate(same, ids, max_new_tokens=NEW).lengths.tolist() == first

    def test_the_loop_stops_when_all_rows_have_ended(self, model, ids, greedy):
        eos = tuple({int(greedy.tokens[0, 2]), int(greedy.tokens[1, 1])})
        state = self.run_decode(model, ids, eos)
        assert int(state.step) == int(state.lengths.max()) <= 3

    def run_decode(self, model, ids, eos):
        out = model(ids)
        state = start_state(out.cache, out.logits[:, -1], size=16, pad=0)
        return decode(model, state, make_sampler("test"), None, jnp.asarray(16), eos=eos, pad=0)


class TestState:
    def test_generation_goes_on_from_its_cache(self, model, ids, greedy):
        part = generate(model, ids, max_new_tokens=4, eos_token_id=())
        np.testing.assert_array_equal(part.tokens, greedy.tokens[:, :4])
        # The cache has read all four; the next token's logits come with the fifth.
        rest = generate(
            model, greedy.tokens[:, 4:5], cache=part.cache, max_new_tokens=NEW - 5, eos_token_id=()
        )
        np.testing.assert_array_equal(rest.tokens, greedy.tokens[:, 5:])
        assert rest.cache.position.tolist() == [9 + NEW] * 2

    def test_the_cache_passed_stays_usable(self, model, ids):
        prefix = model(ids).cache
        first = generate(model, ids[:, :3], cache=prefix, max_new_tokens=5, eos_token_id=())
        second = generate(model, ids[:, :3], cache=prefix, max_new_tokens=5, eos_token_id=())
        np.testing.assert_array_equal(first.tokens, second.tokens)
        whole = generate(model, np.concatenate([ids, ids[:, :3]], 1), max_new_tokens=5, eos_token_id=())
        np.testing.assert_array_equal(first.tokens, whole.tokens)

    def test_logprobs_are_those_of_reading_the_text(self, model, ids, greedy):
        read = np.concatenate([ids, greedy.tokens], 1)
        log_softmax = jax.nn.log_softmax(model(read).logits[:, 8:-1])
        want = jnp.take_along_axis(log_softmax, greedy.tokens[..., None], -1)[..., 0]
        assert relative(greedy.logprobs, want) < 1e-5
        assert generate(model, ids, max_new_tokens=2).logprobs is None

    def test_one_token_from_one_token(self, model, ids):
        new = generate(model, ids[:, :1], max_new_tokens=1, eos_token_id=())
        np.testing.assert_array_equal(new.tokens[:, 0], model(ids[:, :1]).logits[:, -1].argmax(-1))


class TestSampling:
    options = {"temperature": 1.2, "top_p": 0.95, "key": jax.random.key(3), "eos_token_id": ()}

    def test_the_key_decides_whatever_the_batch_and_the_budget(self, model, ids):
        whole = generate(model, ids, max_new_tokens=NEW, **self.options).tokens
        np.testing.assert_array_equal(whole, generate(model, ids, max_new_tokens=NEW, **self.options).tokens)
        more = generate(model, ids, max_new_tokens=40, **self.options).tokens
        np.testing.assert_array_equal(whole, more[:, :NEW])
        alone = generate(model, ids[:1], max_new_tokens=NEW, **self.options).tokens
        np.testing.assert_array_equal(whole[0], alone[0])
        other = generate(model, ids, max_new_tokens=NEW, **{**self.options, "key": jax.random.key(4)}).tokens
        assert (whole != other).any()

    def test_inside_a_jit_of_ones_own(self, model, ids):
        @jax.jit
        def continued(model, ids, key, temperature):
            options = {**self.options, "key": key, "temperature": temperature}
            return generate(model, ids, max_new_tokens=NEW, **options).tokens

        want = generate(model, ids, max_new_tokens=NEW, **self.options).tokens
        np.testing.assert_array_equal(continued(model, jnp.asarray(ids), self.options["key"], 1.2), want)

    def test_other_lengths_budgets_and_options_do_not_compile_again(self, model):
        options = {"temperature": 0.7, "eos_token_id": ()}
        generate(model, random_ids(1, 17), max_new_tokens=17, key=jax.random.key(0), **options)
        compiled = _generate._cache_size()
        for length, budget, seed in ((18, 20, 1), (17, 32, 2), (18, 19, 3)):
            options["temperature"] += 0.1
            new = generate(
                model, random_ids(1, length), max_new_tokens=budget, key=jax.random.key(seed), **options
            )
            assert new.tokens.shape == (1, budget)
        assert _generate._cache_size() == compiled


@pytest.mark.xla_habits
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_holds_no_second_copy_of_the_weights(dtype, batch):
    """XLA on CPU likes to convert half-precision weights once, before the loop, and to keep the copy."""
    config = Mamba2Config.preset("mamba2-130m").replace(num_hidden_layers=2)
    model = nnx.eval_shape(
        lambda: Mamba2ForCausalLM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    state = jax.eval_shape(
        lambda: start_state(
            Mamba2Cache.zeros(config, batch, dtype), jnp.zeros((batch, config.vocab_size)), size=64, pad=0
        )
    )
    run = jax.jit(lambda *a: decode(*a, eos=(0,), pad=0))
    compiled = run.lower(
        model, state, make_sampler("test"), None, jax.ShapeDtypeStruct((), jnp.int32)
    ).compile()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))
    assert weights > 1e8 / (1 if dtype == "float32" else 2)
    assert compiled.memory_analysis().temp_size_in_bytes < weights / 10


GOOD = random_ids(2, 6)
BAD = {
    "rank": ({"input_ids": GOOD[0]}, "input_ids has rank 1"),
    "dtype": ({"input_ids": GOOD / 2}, "input_ids is float64"),
    "range": ({"input_ids": GOOD + 96}, r"input_ids\[0, 0\]"),
    "no tokens": ({"input_ids": GOOD[:, :0]}, "input_ids .* axis l is empty"),
    "no rows": ({"input_ids": GOOD[:0]}, "input_ids .* axis b is empty"),
    "hole": ({"attention_mask": [[1, 0, 1, 1, 1, 1]] * 2}, "attention_mask has a hole"),
    "past + new": ({"attention_mask": np.ones((2, 9), int)}, "attention_mask .* new tokens only"),
    "empty row": ({"attention_mask": [[1] * 6, [0] * 6]}, "row 1 has no token: its attention_mask"),
    "negative temperature": ({"temperature": -1.0}, "temperature=-1.0"),
    "top_p": ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
    "key": ({"temperature": 1.0}, "needs key"),
    "budget zero": ({"max_new_tokens": 0}, "max_new_tokens=0"),
    "budget fraction": ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
    "eos": ({"eos_token_id": 96}, "eos_token_id=96 lies outside"),
    "pad": ({"pad_token_id": -1}, "pad_token_id=-1 lies outside"),
    "vocabulary": ({"vocab_size": 97}, "vocab_size=97"),
    "cache rows": ({"cache": Mamba2Cache.zeros(Mamba2Config(**SIZES), 3)}, "cache holds 3 rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(model, name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=f"^generate: .*{message}"):
        generate(model, **{"input_ids": GOOD, "max_new_tokens": 2, **change})


def test_a_budget_unknown_at_tracing_is_an_error_that_says_so(model):
    run = jax.jit(lambda budget: generate(model, GOOD, max_new_tokens=budget).tokens)
    with pytest.raises(ValueError, match="max_new_tokens=.* known before tracing"):
        run(3)
