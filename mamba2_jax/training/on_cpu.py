"""What training does differently because of XLA on a CPU."""

import ctypes
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.device import platform
from mamba2_jax.typing import Array


def tokens_in_cache(hidden_size: int) -> int:
    """On a CPU a batch is taken at most this many tokens at a time, or a row.

    Its memory does not grow with the batch then, and what passes between layers, `(tokens, hidden_size)`,
    stays near the cores: 2 MB of float32 in a narrow model. Never fewer than 1,024, which was fastest at
    width 768: each turn also passes over all gradients.
    """
    return max(1024, 2**19 // hidden_size)


def rows_in_turn(model: Mamba2ForCausalLM, batch: Mapping[str, Array]) -> Mapping[str, Array]:
    """On a CPU, cut `(b, l)` or `(a, b, l)` into parts of `tokens_in_cache` or fewer, but whole rows.

    Not into parts of less than half of that, which rows of an odd number would make: each costs a pass over
    all gradients. What a batch holds beside arrays of that shape, the loss does not read.
    """
    shape = batch["input_ids"].shape
    *_, rows, length = shape
    most = tokens_in_cache(model.config.hidden_size)
    fewer = max((n for n in range(1, rows + 1) if rows % n == 0 and n * length <= most), default=1)
    worthwhile = fewer < rows and 2 * fewer * length >= most
    if not worthwhile or not on_one_cpu(model):
        return batch
    parts = {name: array for name, array in batch.items() if getattr(array, "shape", None) == shape}
    return {name: array.reshape(-1, fewer, length) for name, array in parts.items()}


def on_one_cpu(model: Mamba2ForCausalLM) -> bool:
    """Whether steps of this model run on a CPU, and not on a mesh."""
    return platform() == "cpu" and model.backbone.mesh is None


def recomputed(function: Callable) -> Callable:
    """Make a function whose backward pass keeps nothing but its arguments.

    What `jax.checkpoint` does, also on CPU: there XLA drops the barrier between the two computations, finds
    that they are the same, and keeps the results of the first after all. It does not look into a branch.
    """
    if platform() != "cpu":
        return jax.checkpoint(function)

    def in_a_branch(*arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        first = next(leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact))
        always = first.ravel()[0] * 0 != 1  # also of NaN; the compiler does not know
        nothing = jax.tree.map(
            lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(function, *arguments)
        )
        return jax.lax.cond(always, function, lambda *_: nothing, *arguments)

    return jax.checkpoint(in_a_branch)


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3), in malloc.h


_MOST = 2**31 - 1  # bytes that are kept, an int of C


def keep_freed_memory() -> bool:
    """Let this process keep up to 2 GiB of what it frees; call it before anything else of JAX.

    With it a step of the model in this package takes 9 % (float32) to 13 % (bfloat16) less time on a CPU. It
    holds for the whole process and cannot be taken back. Without effect on other devices, and without glibc.

    Computations then run in the thread that calls them, for the other threads of glibc's have no memory of
    this size to keep: the next Python line waits for the last one's result.

    Returns:
        Whether memory is kept.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu":
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _MOST))
