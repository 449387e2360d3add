"""What XLA computes for the kernels about each chunk, against the definitions. Any version of jax."""

import jax.numpy as jnp
import numpy as np
import pytest
from mamba2_jax.pallas import chunks

from mamba2_jax.ops import segments


def test_decays_give_the_weight_of_every_pair_of_tokens():
    rng = np.random.default_rng(0)
    b, l, h, chunk = 2, 21, 3, 8
    dt = rng.uniform(0.1, 2, (b, l, h))
    dt[:, 4] = 0
    A = -rng.uniform(1, 4, h)
    decays = np.asarray(chunks.decays(jnp.asarray(dt, jnp.float32), jnp.asarray(A, jnp.float32), chunk))
    assert decays.shape == (b, h, 3, 2, chunk)
    log, steps = np.moveaxis(decays, 3, 0)
    for t in range(l):
        for s in range(t // chunk * chunk, t + 1):
            want = dt[:, s] * np.exp(A * dt[:, s + 1 : t + 1].sum(1))
            got = np.exp2(log[:, :, t // chunk, t % chunk] - log[:, :, s // chunk, s % chunk])
            got = got * steps[:, :, s // chunk, s % chunk]
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-30)
    assert (steps[:, :, 0, 4] == 0).all()
    assert (steps[:, :, 2, 5:] == 0).all()  # past the end


def test_a_slow_token_keeps_its_weight_among_many_that_wipe_the_state():
    dt = np.full((1, 64, 1), 1e-3)
    dt[:, ::2] = 1e4
    log = chunks.decays(jnp.asarray(dt, jnp.float32), jnp.asarray([-16.0]), 64)[0, 0, 0, 0]
    steps = np.diff(np.asarray(log, np.float64))
    assert np.abs(steps[::2] - np.log2(np.e) * -16e-3).max() < 2**-10
    assert (steps[1::2] < -149).all()
    dt = 10 ** np.random.default_rng(0).uniform(-9, 2, (4, 64, 8))
    log = chunks.decays(jnp.asarray(dt, jnp.float32), -jnp.ones(8), 64)[:, :, 0, 0]
    assert (np.diff(log) <= 0).all()


def random_ids(rng, b, l):
    """Ids with padding in front, inside and behind, repeated values, and documents of one token."""
    ids = np.repeat(rng.integers(0, 3, (b, l)), rng.integers(1, 4, l), axis=1)[:, :l]
    ids[0, :5] = 0
    return jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize("seed", range(8))
def test_document_starts_are_those_of_the_project(seed):
    ids = random_ids(np.random.default_rng(seed), 4, 40)
    want = segments.document_starts(ids)
    np.testing.assert_array_equal(chunks.document_starts(ids), want)
    np.testing.assert_array_equal(chunks.document_starts(segments.document_index(ids)), want)


@pytest.mark.parametrize("seed", range(4))
def test_document_ends_by_brute_force(seed):
    chunk, ids = 16, random_ids(np.random.default_rng(seed), 3, 40)
    starts = np.asarray(segments.document_starts(ids))
    got = np.asarray(chunks.document_ends(ids, chunk))
    assert got.shape == (3, 3, 2, chunk)
    starts = np.pad(starts, ((0, 0), (0, 8))).reshape(3, 3, chunk)
    for row in range(3):
        for c in range(3):
            here = np.flatnonzero(starts[row, c])
            assert (got[row, c, 1] == (here[0] if len(here) else chunk)).all()
            for token in range(chunk):
                later = here[here > token]
                assert got[row, c, 0, token] == (later[0] - 1 if len(later) else chunk - 1)
