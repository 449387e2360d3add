"""Bugs planted in the forward kernel, each found by the checker that is there for it.

What the interpreter cannot see, and only a GPU can: a commit left out before a product of the tensor cores,
which read shared memory past the ordinary fences.
"""

import dataclasses

import pytest

pytest.importorskip(
    "mamba2_jax.pallas.mosaic_gpu.bridge", reason="the kernels need jax >= 0.11.2", exc_type=ImportError
)
import interpreter
import reference
import seeding
from jax.experimental import pallas as pl
from mamba2_jax.pallas.mosaic_gpu import bridge
from mamba2_jax.pallas.mosaic_gpu import forward as mosaic_forward
from mamba2_jax.pallas.mosaic_gpu import forward_walk as mosaic_walk
from test_mosaic_forward import KERNEL, TOLERANCE, arguments, error

CASE = dataclasses.replace(KERNEL, name="seeded", l=392, h=1, n=64)  # seven chunks, four stages


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("missing", "caller", "found"),
    [
        ("barrier_wait", "step", "a barrier|a race"),  # a chunk is read before it has arrived
        ("barrier_wait", "refill", "a barrier|a race"),  # a slot is filled again while it is read
        ("wait_smem_to_gmem", "send", "a race"),  # y is overwritten on its way out
        ("commit_smem", "send", "a race"),  # y leaves before it is written
    ],
)
def test_a_missing_wait_or_commit_is_found(missing, caller, found):
    with seeding.without(missing, caller), pytest.raises(interpreter.Found, match=found):
        interpreter.run(mosaic_forward.forward, **arguments(CASE, "bfloat16"), pieces=1)


def test_an_unwritten_tile_is_found(monkeypatch):
    send = mosaic_walk.Walk.send
    monkeypatch.setattr(
        mosaic_walk.Walk, "send", lambda walk, chunk, y: pl.when(chunk != 2)(lambda: send(walk, chunk, y))
    )
    with pytest.raises(interpreter.Found, match="unwritten: 4096 elements"):
        interpreter.run(mosaic_forward.forward, **arguments(CASE, "bfloat16"), pieces=1)


@pytest.mark.parametrize("wrong", ["no token sees itself", "a token sees the next"])
def test_a_mask_off_by_one_shows_in_the_values(monkeypatch, wrong):
    def seen(last):
        source, target = bridge.row_and_column(64, 64)
        return target > source if wrong == "no token sees itself" else target >= source - 1

    monkeypatch.setattr(mosaic_walk, "seen", seen)
    inputs = arguments(CASE, "bfloat16")
    y, _, _ = interpreter.run(mosaic_forward.forward, **inputs, pieces=1)
    assert error(y, reference.ssd(**inputs)[0]) > 5 * TOLERANCE["bfloat16"]


def test_a_document_end_off_by_one_shows_in_the_values(monkeypatch):
    ends = mosaic_forward.document_ends
    monkeypatch.setattr(mosaic_forward, "document_ends", lambda *args: ends(*args) + 1)
    inputs = arguments(dataclasses.replace(CASE, segments="packed"), "bfloat16")
    y, _, _ = interpreter.run(mosaic_forward.forward, **inputs, pieces=1)
    assert error(y, reference.ssd(**inputs)[0]) > TOLERANCE["bfloat16"]
