"""Scores and texts of a model on a mesh are those of one device."""

import functools

import numpy as np
import pytest
from flax import nnx
from meshes import small_config

from mamba2_jax import Mamba2ForCausalLM
from mamba2_jax.evaluation import loglikelihoods
from mamba2_jax.mesh import make_mesh

TOLERANCE = 1e-4  # float32 sums of up to 20 log-probabilities in another order


def requests() -> list[tuple[list[int], list[int]]]:
    ids = np.random.default_rng(0).integers(3, 96, 80).tolist()
    return [(ids[:40] + ids[40 : 44 + i % 5], ids[50 : 51 + 4 * (i % 3)]) for i in range(12)]


@functools.cache
def model() -> Mamba2ForCausalLM:
    return Mamba2ForCausalLM(small_config(2), rngs=nnx.Rngs(0))


@functools.cache
def on_one_device() -> list[tuple[float, bool]]:
    return loglikelihoods(model(), requests(), rows=8)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "tensor": 2, "sequence": 2}], ids=str)
def test_scores_on_a_mesh(axes):
    on_one_device()
    sharded = Mamba2ForCausalLM(small_config(2), rngs=nnx.Rngs(0))
    sharded.to_mesh(make_mesh(**axes))
    for (logprob, greedy), want in zip(
        loglikelihoods(sharded, requests(), rows=8), on_one_device(), strict=True
    ):
        assert abs(logprob - want[0]) < TOLERANCE
        assert greedy == want[1]
