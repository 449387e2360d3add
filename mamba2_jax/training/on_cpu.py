"""Work around XLA's behavior on a CPU in training: microbatch size, update, remat and memory allocation."""

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.device import platform
from mamba2_jax.typing import Array

_Tree = TypeVar("_Tree", bound=tuple)


def tokens_in_cache(hidden_size: int) -> int:
    """Return the Trainer's default number of tokens per microbatch on a CPU.

    With microbatches of a fixed size, the memory of a step does not grow with the batch, and the activations
    between layers, `(tokens, hidden_size)`, stay in cache: 2 MB of float32 in a narrow model. At least 1,024
    tokens, the fastest at width 768, because each microbatch also reads and writes all gradients.
    """
    return max(1024, 2**19 // hidden_size)


def rows_in_turn(batch: Mapping[str, Any], tokens: int) -> Mapping[str, Any]:
    """Split a batch `(b, l)` or `(a, b, l)` into microbatches `(n, r, l)` of at most `tokens` tokens.

    Rows stay whole. Returned unsplit where microbatches would have less than half of `tokens`, as with an odd
    number of rows: each costs a pass over all gradients. Entries of another shape, which the loss does not
    read, are dropped.
    """
    shape = batch["input_ids"].shape
    *_, rows, length = shape
    fewer = max((n for n in range(1, rows + 1) if rows % n == 0 and n * length <= tokens), default=1)
    if fewer == rows or 2 * fewer * length < tokens:
        return batch
    parts = {name: array for name, array in batch.items() if getattr(array, "shape", None) == shape}
    return {name: array.reshape(-1, fewer, length) for name, array in parts.items()}


def on_one_cpu(model: Mamba2ForCausalLM) -> bool:
    """Tell whether training steps of `model` run on a CPU without a mesh."""
    return platform() == "cpu" and model.backbone.mesh is None


def choose_update(finite: Array, update: Callable[..., _Tree], old: _Tree, *, in_place: bool) -> _Tree:
    """Return `update(*old)` if `finite`, else `old`; the numbers do not depend on `in_place`.

    `in_place`, for one CPU, selects `lax.cond`: for `jnp.where`, XLA on a CPU first copies all optimizer
    moments (peak memory by the compiler, all weights trained, `where` and `cond`: 74.8 GB and 54.1 GB for
    mamba2-2.7b, 3.58 GB and 2.82 GB for mamba2-130m). A mesh needs `jnp.where`: the results of a branch have
    no sharding annotation and would be replicated on every device.
    """
    if in_place:
        return jax.lax.cond(finite, update, lambda *same: same, *old)
    return jax.tree.map(partial(jnp.where, finite), update(*old), old)


def recomputed(function: Callable) -> Callable:
    """Wrap a function so that its backward pass saves only the arguments and recomputes the rest.

    Like `jax.checkpoint`, but effective on a CPU, where XLA drops the optimization barrier, merges the
    recomputation with the forward pass (CSE) and so saves its results after all. XLA does not merge across a
    `lax.cond`, which therefore holds the recomputation here.
    """
    if platform() != "cpu":
        return jax.checkpoint(function)

    def wrapped(*arguments: Any) -> Any:
        leaves, treedef = jax.tree.flatten(arguments)
        run = jax.custom_jvp(lambda *leaves: function(*treedef.unflatten(leaves)))
        run.defjvp(partial(_recomputed_jvp, run.fun), symbolic_zeros=True)
        return run(*leaves)

    return wrapped


def _recomputed_jvp(function: Callable, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    """Compute value and tangent of `function`, the tangent as one primitive, transposed as a whole."""
    out, treedef = jax.tree.flatten(function(*primals))
    moving = tuple(not isinstance(dot, SymbolicZero) for dot in tangents)
    jaxpr = jax.make_jaxpr(function)(*primals)
    dots = [dot for dot, moves in zip(tangents, moving, strict=True) if moves]
    of_floats = iter(_tangent.bind(*primals, *dots, jaxpr=jaxpr, moving=moving))
    out_dot = [next(of_floats) if _is_float(one) else np.zeros(one.shape, jax.dtypes.float0) for one in out]
    return treedef.unflatten(out), treedef.unflatten(out_dot)


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _split(arguments: Sequence[Any], jaxpr: ClosedJaxpr, moving: tuple[bool, ...]) -> tuple:
    """Split the arguments of `_tangent`: function of the differentiated primals, those primals, tangents."""
    primals, dots = arguments[: len(moving)], tuple(arguments[len(moving) :])

    def of_moving(*moved: Array) -> list[Array]:
        of_moved = iter(moved)
        every = [next(of_moved) if moves else a for a, moves in zip(primals, moving, strict=True)]
        return [out for out in jaxpr_as_fun(jaxpr)(*every) if _is_float(out)]

    return of_moving, tuple(a for a, moves in zip(primals, moving, strict=True) if moves), dots


def _tangent_of_floats(*arguments: Array, jaxpr: ClosedJaxpr, moving: tuple[bool, ...]) -> list[Array]:
    of_moving, point, dots = _split(arguments, jaxpr, moving)
    return jax.jvp(of_moving, point, dots)[1]


_tangent = Primitive("mamba2_recomputed_tangent")
_tangent.multiple_results = True
_tangent.def_impl(_tangent_of_floats)
mlir.register_lowering(_tangent, mlir.lower_fun(_tangent_of_floats, multiple_results=True))


@_tangent.def_abstract_eval
def _tangent_shapes(*arguments: Any, jaxpr: ClosedJaxpr, moving: tuple[bool, ...]) -> list[Any]:
    return [aval for aval in jaxpr.out_avals if _is_float(aval)]


def _tangent_jvp(arguments: Sequence[Array], tangents: Sequence[Any], **options: Any) -> tuple:
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(partial(_tangent_of_floats, **options), arguments, tangents)


def _tangent_transpose(cotangents: Sequence[Any], *arguments: Any, jaxpr: ClosedJaxpr, moving: tuple) -> list:
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    primals = arguments[: len(moving)]

    def gradient(primals: Sequence[Array], cotangents: list[Array]) -> list[Array]:
        of_moving, point, _ = _split(primals, jaxpr, moving)
        return list(jax.vjp(of_moving, *point)[1](cotangents))

    def nothing(primals: Sequence[Array], cotangents: list[Array]) -> list[Array]:
        return [jnp.zeros_like(a) for a, moves in zip(primals, moving, strict=True) if moves]

    first = next(a for a, moves in zip(primals, moving, strict=True) if moves)
    always = first.ravel()[0] * 0 != 1  # true even for NaN, but opaque to XLA
    return [None for _ in moving] + jax.lax.cond(always, gradient, nothing, primals, cotangents)


def _tangent_batched(arguments: Sequence[Array], axes: Sequence[int | None], **options: Any) -> tuple:
    out = jax.vmap(partial(_tangent_of_floats, **options), axes)(*arguments)
    return out, [0] * len(out)


ad.primitive_jvps[_tangent] = _tangent_jvp
ad.primitive_transposes[_tangent] = _tangent_transpose
batching.primitive_batchers[_tangent] = _tangent_batched


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3), in malloc.h
_MOST = 2**31 - 1  # bytes of freed memory kept; the largest C int


def keep_freed_memory() -> bool:
    """Let the C allocator keep up to 2 GiB of freed memory in this process; call before any other use of JAX.

    A training step of the model in this package takes 9 % (float32) to 13 % (bfloat16) less time on a CPU.
    The setting holds for the whole process and is irreversible. No effect on other devices or without glibc.

    Also turns off asynchronous dispatch: computations run in the calling thread, and the next Python line
    waits for their results, because glibc's arenas of other threads cannot keep blocks of this size.

    Returns:
        Whether freed memory is kept.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu":
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _MOST))
