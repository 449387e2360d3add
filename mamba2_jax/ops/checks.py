"""Argument checks of the operators: static properties always, values only on concrete arrays."""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mamba2_jax.typing import Array


def check_shape(op: str, name: str, array: Array | np.ndarray, axes: str, **sizes: int) -> None:
    """Raise ValueError unless `array` has the axes `axes` ("b l h") of the given `sizes`, none empty."""
    letters = axes.split()
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise ValueError(f"{op}: {name} must be an array ({', '.join(letters)}), got {type(array).__name__}")
    wanted = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters)
    if len(array.shape) != len(letters):
        raise ValueError(
            f"{op}: {name} has rank {len(array.shape)} and shape {tuple(array.shape)}, wants ({wanted})"
        )
    for letter, size in zip(letters, array.shape, strict=True):
        if letter in sizes and size != sizes[letter]:
            raise ValueError(f"{op}: {name} has shape {tuple(array.shape)}, wants ({wanted})")
        if size == 0:
            raise ValueError(
                f"{op}: {name} has shape {tuple(array.shape)}: axis {letter} is empty; give at least one"
            )


def check_dtype(op: str, **arrays: Array | np.ndarray | None) -> None:
    """Raise ValueError unless every given array has a floating-point dtype."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{op}: {name} is {array.dtype}, wants a floating-point dtype; cast it with .astype"
            )


def check_integer(op: str, **arrays: Array | np.ndarray | None) -> None:
    """Raise ValueError unless every given array has an integer or boolean dtype."""
    for name, array in arrays.items():
        if array is None:
            continue
        if not (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_):
            raise ValueError(
                f"{op}: {name} is {array.dtype}, wants integers; cast it with .astype(jnp.int32)"
            )


def check_groups(op: str, num_heads: int, num_groups: int) -> None:
    """Raise ValueError unless `num_heads` is a multiple of `num_groups`."""
    if num_heads % num_groups:
        raise ValueError(
            f"{op}: num_heads={num_heads} is not a multiple of num_groups={num_groups}; "
            "check n_groups in the config"
        )


def check_choice(op: str, name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{op}: {name}={value!r} is not one of {', '.join(map(repr, choices))}")


def is_concrete(array: object) -> bool:
    """Return whether `array` is concrete, not a tracer, so that its values can be read."""
    return not isinstance(array, Tracer)
