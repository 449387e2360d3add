"""Shapes in signatures, checked at run time: what the import hook of `conftest.py` does to each function."""

import inspect
import pathlib
import typing
from collections.abc import Callable

from beartype import beartype
from jaxtyping import AbstractArray

ROOT = pathlib.Path(__file__).parents[1]

# Doors of the package: their own checks come first, are tested, and name the op and the way out. What they
# hand on is checked.
DOORS = {
    "ops.attention.attention_step",
    "ops.attention.causal_attention",
    "ops.attention.rotary_embedding",
    "ops.attention.write_slots",
    "ops.conv.causal_conv1d.causal_conv1d",
    "ops.conv.causal_conv1d.causal_conv1d_step",
    "ops.conv.sharded.causal_conv1d_sharded",
    "ops.gate.silu_gate",
    "ops.rms_norm.gated_rms_norm",
    "ops.rms_norm.rms_norm",
    "ops.scan.api.ssd",
    "ops.scan.api.ssd_step",
    "ops.scan.sharded.ssd_sharded",
    "models.mamba2.Mamba2ForCausalLM.__call__",
    "models.mamba2.Mamba2Model.__call__",
    "generation.decoding.generate",
}


def modules() -> list[str]:
    """Every module of the package; no `__init__`, because the hook takes a package's name for all in it.

    Not the kernels: their arguments have no shapes in the signature, and Triton reads the source of its own.
    """
    files = [file.relative_to(ROOT) for file in (ROOT / "mamba2_jax").rglob("*.py")]
    return [".".join(file.with_suffix("").parts) for file in files if file.name != "__init__.py"]


def checked(function: Callable) -> Callable:
    """Check the annotations of a function that has a shape among them, unless it is a door.

    Nor is the `__init__` of a dataclass checked: JAX makes pytrees also of other things than arrays.
    """
    name = f"{function.__module__}.{function.__qualname__}".removeprefix("mamba2_jax.")
    if name in DOORS or function.__name__ == "__init__":
        return function
    return (
        beartype(function) if any(map(_has_shape, inspect.get_annotations(function).values())) else function
    )


def _has_shape(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))
