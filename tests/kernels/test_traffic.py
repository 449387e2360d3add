"""Bytes of HBM per call against the least that the operation can touch; and that the count is right."""

import ast
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip(
    "mamba2_jax.pallas.mosaic_gpu.bridge", reason="the kernels need jax >= 0.11.2", exc_type=ImportError
)
import backward_programs
import forward_programs
import traffic
from forward_programs import SHAPES, Program
from mamba2_jax.pallas.mosaic_gpu import bridge


def forward_floor(b, l, h, g, p=64, n=128):
    """x in, y out, B, C, dt, all in 16 bits, and the final state in 32."""
    return b * l * (4 * h * p + 2 * h + 4 * g * n) + 4 * b * h * p * n


@pytest.mark.parametrize("name", SHAPES)
def test_the_forward_is_within_15_per_cent_of_the_floor(name):
    program = Program(name, **SHAPES[name])
    counted = traffic.hbm_bytes(*forward_programs.traced(program))
    assert 1.0 < sum(counted.values()) / forward_floor(**SHAPES[name]) <= 1.15


def test_saved_states_cost_twice_x():
    def counted(**options):
        program = Program("B", **SHAPES["B"], **options)
        return sum(traffic.hbm_bytes(*forward_programs.traced(program)).values())

    x_bytes = 8 * 2048 * 80 * 64 * 2
    assert counted(save_states=True) - counted() == x_bytes * 128 // 64


def test_the_count_on_a_sum_that_is_easy_to_count():
    def function(a, b):
        run = bridge.kernel(None, outputs=(jax.ShapeDtypeStruct((8,), jnp.bfloat16),), scratch={}, grid={})
        (first,) = run(a.reshape(4, 16), b * 2)  # reads a, a new b: XLA reads b and writes it
        (second,) = run(first, a)  # reads first and a
        return second + 1, first  # XLA reads second and writes the sum

    a, b = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((2, 5), jnp.float32)
    counted = traffic.hbm_bytes(function, a, b)
    assert counted["launches"] == (256 + 40 + 16) + (16 + 256 + 16)
    assert counted["xla"] == (40 + 40) + (16 + 16)


def test_the_notebook_shows_what_is_counted():
    notebook = pathlib.Path(__file__).parents[2] / "notebooks" / "03_ssd_kernels.ipynb"
    cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"]]
    (line,) = [line for cell in cells for line in cell.splitlines() if line.startswith("COUNTED = ")]
    shown = ast.literal_eval(line.removeprefix("COUNTED = "))
    assert set(shown) == set(SHAPES)
    for name, (forward, backward) in shown.items():

        def megabytes(programs, program):
            return sum(traffic.hbm_bytes(*programs.traced(program)).values()) / 1e6

        run = megabytes(forward_programs, Program(name, **SHAPES[name]))
        saving = megabytes(forward_programs, Program(name, **SHAPES[name], save_states=True))
        back = megabytes(backward_programs, backward_programs.Program(name, **SHAPES[name]))
        assert (forward, backward) == (round(run, 1), round(back + saving - run, 1)), name
