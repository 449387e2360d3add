"""Checksums of a checkpoint's arrays and of its metadata, which Orbax does not have."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax.typing import Array


def checked_content(meta: dict[str, Any], step: int) -> dict[str, Any]:
    """Parse the metadata of the checkpoint of `step`; raise ValueError if it is damaged."""
    if hashlib.sha256(meta["content"].encode()).hexdigest() != meta["sha256"]:
        raise ValueError("its metadata does not match its checksum")
    content = json.loads(meta["content"])
    if content["step"] != step:
        raise ValueError(f"its metadata is of step {content['step']}")
    return content


def check_sums(arrays: dict[str, Array], content: dict[str, Any]) -> None:
    """Raise ValueError unless the arrays match their checksums in the metadata."""
    found = jax.device_get(checksums(arrays))
    wrong = [name for name, value in found.items() if content["checksums"].get(name) != int(value)]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays do not match their checksums, the first is {wrong[0]}")


def fingerprint(arrays: dict[str, Array]) -> str:
    """Return a short hash of all bits of named arrays, independent of their sharding."""
    sums = {name: int(value) for name, value in jax.device_get(checksums(arrays)).items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def checksums(arrays: dict[str, Array]) -> dict[str, Array]:
    """Compute a uint32 checksum per array, independent of sharding: the sum of words times odd weights.

    A change of a single word always changes the sum, because odd numbers are invertible modulo 2^32.
    """

    def one(array: Array) -> Array:
        unsigned = np.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
        words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
        place, stride = jnp.zeros(words.shape, jnp.uint32), 1
        for axis in reversed(range(words.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
            stride *= words.shape[axis]
        return jnp.sum(words * (place * np.uint32(0x9E3779B2) + np.uint32(1)), dtype=jnp.uint32)

    return {name: one(array) for name, array in arrays.items()}
