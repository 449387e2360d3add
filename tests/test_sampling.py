"""Filters against transformers' own, frequencies against probabilities, options out of range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba2_jax.generation.sampling import choose_token, filter_logits, make_sampler

LOGITS = np.asarray(3 * jax.random.normal(jax.random.key(0), (4, 50)), np.float32)


def keys(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


FILTERS = {
    "top_k": {"top_k": 7},
    "top_k of everything": {"top_k": 500},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "top_p below float32's range": {"top_p": 1e-45},
    "all three": {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_filters_equal_transformers(name, temperature):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    options = FILTERS[name]
    want = process.TemperatureLogitsWarper(temperature)(None, torch.tensor(LOGITS))
    if "top_k" in options:
        want = process.TopKLogitsWarper(options["top_k"])(None, want)
    if "top_p" in options:
        want = process.TopPLogitsWarper(options["top_p"])(None, want)
    if "min_p" in options:
        want = process.MinPLogitsWarper(options["min_p"])(None, want)
    sampler = make_sampler("test", temperature=temperature, **options)
    got = filter_logits(jnp.asarray(LOGITS) / temperature, sampler)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    assert (np.isfinite(got).sum(1) >= 1).all()


@pytest.mark.parametrize("top_p", [1e-45, 0.2, 0.55, 0.9])
def test_top_p_keeps_of_equally_likely_tokens_those_that_transformers_keeps(top_p):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    logits = np.random.default_rng(0).integers(0, 3, (6, 40)).astype(np.float32)
    want = process.TopPLogitsWarper(top_p)(None, torch.tensor(logits)).numpy()
    got = filter_logits(jnp.asarray(logits), make_sampler("test", temperature=1.0, top_p=top_p))
    # as many of each value; which ones is left to PyTorch's sort, which is not stable
    np.testing.assert_array_equal(np.sort(got, axis=1), np.sort(want, axis=1))
    assert (
        np.isfinite(got).sum(1) < (logits >= np.where(np.isfinite(want), want, 9).min(1)[:, None]).sum(1)
    ).any()


@pytest.mark.parametrize("option", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [1e-45, 1e-300, 1e300])
def test_options_at_the_edge_of_float32_choose_a_token(option, value):
    if value > 1 and option in ("top_p", "min_p"):
        return
    options = {"temperature": 0.7, option: value}
    sampler = make_sampler("test", **options, vocab_size=40)
    seen = jnp.arange(50) % 2 == 0
    tokens = choose_token(jnp.asarray(LOGITS), sampler, jnp.tile(seen, (4, 1)), keys(4))
    assert (tokens < 40).all()
    if option == "top_p" or (option == "temperature" and value < 1):
        np.testing.assert_array_equal(tokens, LOGITS[:, :40].argmax(1))


def test_ends_in_the_padding_of_the_vocabulary_can_be_chosen():
    logits = jnp.asarray(LOGITS).at[:, 45].set(50.0).at[:, 46].set(99.0)
    sampler = make_sampler("test", vocab_size=40, ends=(45,))
    assert choose_token(logits, sampler, None, None).tolist() == [45] * 4


def test_repetition_penalty_equals_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    ids = np.concatenate([LOGITS.argsort(1)[:, -2:], LOGITS.argsort(1)[:, :3]], 1)  # likely and unlikely ones
    want = process.RepetitionPenaltyLogitsProcessor(2.5)(torch.tensor(ids), torch.tensor(LOGITS))
    seen = np.zeros((4, 50), bool)
    np.put_along_axis(seen, ids, True, 1)
    sampler = make_sampler("test", repetition_penalty=2.5)
    got = choose_token(jnp.asarray(LOGITS), sampler, jnp.asarray(seen), None)
    np.testing.assert_array_equal(got, want.argmax(1))
    assert (np.asarray(got) != LOGITS.argmax(1)).any()  # the penalty did decide somewhere


def test_frequencies_follow_the_probabilities():
    logits = np.array([2.0, 1.0, 0.0, -1.0, -2.0], np.float32)
    sampler = make_sampler("test", temperature=0.8, top_k=4)
    weights = np.exp(logits / 0.8) * (np.arange(5) < 4)
    expected = weights / weights.sum()
    count = 20_000
    drawn = choose_token(jnp.tile(logits, (count, 1)), sampler, None, keys(count))
    observed = np.bincount(drawn, minlength=5) / count
    # five standard deviations of a share among 20000 draws
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 5.0}])
def test_padding_of_the_vocabulary_is_never_chosen(options):
    logits = jnp.asarray(LOGITS).at[:, 40:].set(100.0)
    sampler = make_sampler("test", vocab_size=40, **options)
    for seed in range(20):
        assert (choose_token(logits, sampler, None, keys(4, seed)) < 40).all()


def test_a_row_depends_on_its_own_key_alone():
    sampler = make_sampler("test", temperature=1.0, top_p=0.9)
    whole = choose_token(jnp.asarray(LOGITS), sampler, None, keys(4))
    for row in range(4):
        alone = choose_token(jnp.asarray(LOGITS[row : row + 1]), sampler, None, keys(4)[row : row + 1])
        assert alone[0] == whole[row]
    np.testing.assert_array_equal(whole, choose_token(jnp.asarray(LOGITS), sampler, None, keys(4)))


def test_a_very_low_temperature_is_greedy():
    sampler = make_sampler("test", temperature=1e-9)
    np.testing.assert_array_equal(choose_token(jnp.asarray(LOGITS), sampler, None, keys(4)), LOGITS.argmax(1))


BAD = {
    "negative temperature": ({"temperature": -0.1}, "temperature=-0.1"),
    "temperature not a number": ({"temperature": float("nan")}, "temperature=nan"),
    "no temperature": ({"temperature": None}, "temperature=None"),
    "top_p zero": ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
    "top_p above one": ({"temperature": 1.0, "top_p": 1.01}, "top_p=1.01"),
    "min_p": ({"temperature": 1.0, "min_p": 1.5}, "min_p=1.5"),
    "top_k zero": ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
    "top_k fraction": ({"temperature": 1.0, "top_k": 1.5}, "top_k=1.5"),
    "penalty": ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    "filter without sampling": ({"top_p": 0.9}, "top_p=0.9 needs sampling: set temperature"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=f"^caller: {message}"):
        make_sampler("caller", **options)
