"""The decoding kernels on a Hopper GPU against the float64 recurrence, at sizes of published models."""

import dataclasses

import jax
import pytest
from test_mixer_step import Case, check, draw

from mamba2_jax import ops

MODEL = Case("130m", b=1, h=24, p=64, g=1, n=128, d=768, projected=True)
CASES = [
    MODEL,
    dataclasses.replace(MODEL, name="130m, 64 rows, ended", b=64, mask=True),
    dataclasses.replace(MODEL, name="130m, 65 rows", b=65),
    dataclasses.replace(MODEL, name="80 heads, three rows", b=3, h=80, d=640),
    dataclasses.replace(MODEL, name="groups, head_dim 128", b=2, h=16, p=128, g=8, d=512, D="hp"),
    dataclasses.replace(MODEL, name="head_dim 80, state_dim 256, between", p=80, n=256, h=8, projected=False),
    dataclasses.replace(MODEL, name="head_dim 32, state_dim 64, gate alone", b=5, p=32, n=64, norm=False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_equal_the_float64_recurrence(case, dtype):
    if getattr(jax.devices()[0], "compute_capability", None) != "9.0":
        pytest.skip("needs an H100 or H200")
    arguments = draw(case, dtype)
    inputs, state, weights, mask, options = arguments.values()
    step = jax.jit(
        lambda *arrays: ops.mixer_step(
            *arrays[:3], mask=arrays[3], options=options, implementation="mosaic_gpu"
        )
    )
    with jax.default_matmul_precision("highest"):  # of what XLA multiplies
        check(case, dtype, arguments, step(inputs, state, weights, mask))
