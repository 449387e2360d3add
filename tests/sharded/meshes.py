"""Meshes of eight devices, rows that cross them in every way, and what a compiled function sends."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ssd_cases import segment_ids

from mamba2_jax import Mamba2Config

AXES = ("data", "fsdp", "sequence", "tensor")
SIZES = {
    "sequence 8": {"sequence": 8},
    "sequence 4, tensor 2": {"sequence": 4, "tensor": 2},
    "sequence 2, tensor 2, data 2": {"sequence": 2, "tensor": 2, "data": 2},
    "tensor 8": {"tensor": 8},
    "data 8": {"data": 8},
}


def small_config(num_groups: int, **changes) -> Mamba2Config:
    """Two layers that eight devices divide along every axis but the groups."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16}
    return Mamba2Config(n_groups=num_groups, **{**sizes, "vocab_size": 96, "pad_token_id": 0, **changes})


TRAINING_MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 8": {"tensor": 8},
    "tensor 2 x fsdp 4": {"tensor": 2, "fsdp": 4},
    "sequence 8": {"sequence": 8},
    "sequence 2 x tensor 2 x data 2": {"sequence": 2, "tensor": 2, "data": 2},
}


def mesh_cases(*quick: tuple[str, int]):
    """Every mesh with 1, 2 and 8 groups, as sizes and groups; all but the `quick` ones are marked slow."""
    return [
        pytest.param(
            sizes,
            num_groups,
            id=f"{name}, groups {num_groups}",
            marks=() if (name, num_groups) in quick else (pytest.mark.slow,),
        )
        for name, sizes in TRAINING_MESHES.items()
        for num_groups in (1, 2, 8)
    ]


def make_mesh(sizes: dict[str, int]) -> Mesh:
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def place(mesh: Mesh, arrays: dict, specs: dict[str, PartitionSpec]) -> dict:
    return {name: jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in arrays.items()}


def awkward_rows(length: int) -> np.ndarray:
    """Eight rows: borders of documents and padding before, on and after borders of devices."""
    eighth = length // 8
    ids = np.ones((8, length), np.int32)
    ids[1:3] = segment_ids("packed", 2, length)
    ids[3] = segment_ids("repeating", 1, length)[0]
    ids[4, : 2 * eighth + 1] = 0  # padding at the left, over two devices
    ids[5, 3 * eighth + 2 :] = 0  # at the right, over four
    ids[6, :eighth], ids[6, eighth : 4 * eighth] = 7, 3  # documents that begin where a device does
    ids[6, 4 * eighth : 5 * eighth + 1] = 0  # and padding in the middle
    ids[7] = 0
    return ids


def random_rows(rng: np.random.Generator, length: int) -> np.ndarray:
    """Eight rows of runs of 0, 1 and 2 of random lengths."""
    ids = [np.repeat(rng.integers(0, 3, length), rng.integers(1, length // 2, length)) for _ in range(8)]
    return np.stack([row[:length] for row in ids]).astype(np.int32)


def error(got, want) -> float:
    """Relative error; of arrays `(b, l, ...)` the largest of a row, which is not lost beside larger rows."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    assert np.isfinite(got).all()
    axes = tuple(range(want.ndim > 2, want.ndim))
    size = np.sqrt(np.square(want).sum(axes))
    return (np.sqrt(np.square(got - want).sum(axes)) / np.maximum(size, 1e-30)).max()


def assert_equal(got, want, tolerance: float) -> None:
    """Compare two pytrees of arrays."""
    for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert one.shape == other.shape, path
        assert one.dtype == other.dtype, path
        assert error(one, other) < tolerance, path


def collectives(function, *arguments) -> list[tuple[str, int]]:
    """What the compiled function sends: name and bytes per device of each collective, sorted.

    Those within groups of one device, as over a mesh axis of size 1, send nothing.
    """
    alone = r"\{\{\d+\}|\[\d+,1\]<="
    text = jax.jit(function).lower(*arguments).compile().as_text()
    names = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    found = re.findall(rf"= (.*?) ({names})(?:-start)?\((?!.*replica_groups=(?:{alone}))", text)
    return sorted((name, sum(map(_bytes, re.findall(r"[a-z]\w*\[[\d,]*\]", shape)))) for shape, name in found)


def _bytes(shape: str) -> int:
    dtype, dimensions = shape.rstrip("]").split("[")
    width = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
    return width * math.prod(int(size) for size in dimensions.split(",") if size)
