"""Check shape annotations at run time, in the functions that the import hook of `conftest.py` decorates."""

import inspect
import pathlib
import typing
from collections.abc import Callable

from beartype import beartype
from jaxtyping import AbstractArray

ROOT = pathlib.Path(__file__).parents[1]

# Public entry points with checks of their own, whose messages name the op and a remedy and are tested. Exempt
# from the hook, which would raise first; the functions they call are checked.
DOORS = {
    "layers.piece.Piece.__call__",
    "ops.attention.attention_step",
    "ops.attention.causal_attention",
    "ops.attention.rotary_embedding",
    "ops.attention.write_slots",
    "ops.conv.causal_conv1d.causal_conv1d",
    "ops.conv.causal_conv1d.causal_conv1d_step",
    "ops.conv.sharded.causal_conv1d_sharded",
    "ops.experts.experts",
    "ops.experts.experts_sharded",
    "ops.gate.silu_gate",
    "ops.mixer_step.mixer_step",
    "ops.rms_norm.gated_rms_norm",
    "ops.rms_norm.rms_norm",
    "ops.scan.api.ssd",
    "ops.scan.api.ssd_step",
    "ops.scan.sharded.ssd_sharded",
    "models.inspection.inspect",
    "models.mamba2.Mamba2ForCausalLM.__call__",
    "models.mamba2.Mamba2Model.__call__",
    "models.pooling.embed",
    "generation.decoding.generate",
}


def modules() -> list[str]:
    """List every module of the package but `__init__`: for a package, the hook would match all its modules.

    Excludes the kernels: their signatures have no shapes, and Triton parses the source of its own.
    """
    files = [file.relative_to(ROOT) for file in (ROOT / "mamba2_jax").rglob("*.py")]
    return [".".join(file.with_suffix("").parts) for file in files if file.name != "__init__.py"]


def checked(function: Callable) -> Callable:
    """Decorate a function with beartype if its annotations contain a shape and it is not in `DOORS`.

    Skips `__init__`, of dataclasses too: JAX unflattens pytrees with leaves other than arrays.
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
