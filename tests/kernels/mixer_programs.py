"""The decoding kernels' configurations that are compiled ahead of time, and the bytes that they move."""

import dataclasses
import functools
import math
from typing import ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
from mamba2_jax.pallas.mosaic_gpu import bridge, mixer
from program import Named

from mamba2_jax import ops

BETWEEN, WHOLE = 1, 3  # kernels: without and with those of the projections


@dataclasses.dataclass(frozen=True)
class Program(Named):
    """A mixer and its options; with a width `d`, the projections too."""

    b: int = 1
    h: int = 128
    p: int = 64
    g: int = 8
    n: int = 128
    d: int = 4096
    dtype: str = "bfloat16"
    mask: bool = False
    kernels: int = dataclasses.field(default=WHOLE, kw_only=True)
    not_built: ClassVar[tuple[str, ...]] = (*Named.not_built, "kernels")

    @property
    def described(self) -> str:
        """The shape and options in one line."""
        shape = f"b{self.b} h{self.h} g{self.g} p{self.p} n{self.n} d{self.d}"
        return ", ".join(filter(None, [shape, self.dtype, "ended rows" * self.mask]))


PROGRAMS = [
    Program("Codestral, one row", smoke=True),
    Program("Codestral, 64 rows", b=64, mask=True),
    Program("2.7b, one row", h=80, g=1, d=2560),
    Program("130m, eight rows", b=8, h=24, g=1, d=768, mask=True, slow=True),
    Program("256 rows", b=256, mask=True, kernels=BETWEEN, slow=True),
    Program(
        "head_dim 80, state_dim 256, float32", b=4, h=16, g=2, p=80, n=256, d=640, dtype="float32", kernels=1
    ),
    Program("head_dim 32, state_dim 64", b=3, h=32, p=32, n=64, d=512, slow=True),
    Program("head_dim 128", b=2, h=32, p=128, g=1, d=2048, slow=True),
]


def build(abstract, b, h, p, g, n, d, dtype, mask):
    """The mixer's step as a function of arrays, and its arguments."""
    inner, columns, taps = h * p, g * n, 4
    leaves = ((2, inner), (2, columns), (h,))
    weights = ops.MixerWeights(
        taps_x=abstract((taps, inner), dtype),
        taps_BC=abstract((taps, 2, columns), dtype),
        bias_x=abstract((inner,), dtype),
        bias_BC=abstract((2, columns), dtype),
        dt_bias=abstract((h,), dtype),
        A_log=abstract((h,), dtype),
        D=abstract((h,), dtype),
        norm=abstract((inner,), dtype),
        input=tuple(abstract((d, *leaf), dtype) for leaf in leaves),
        output=abstract((inner, d), dtype),
    )
    state = ops.MixerState(
        conv_x=abstract((b, taps - 1, inner), dtype),
        conv_BC=abstract((b, taps - 1, 2, columns), dtype),
        ssm=abstract((b, h, p, n), jnp.float32),
    )
    arguments = abstract((b, d), dtype), state, weights, abstract((b,), jnp.bool_) if mask else None
    flat, tree = jax.tree.flatten(arguments)
    step = functools.partial(mixer.mixer_step, dt_limits=(0.0, float("inf")), eps=1e-5)
    return (lambda *arrays: step(*tree.unflatten(arrays))), flat


def hbm_bytes(program) -> int:
    """Count what the kernels read and write, each array once, and twice if it is updated in place."""
    moved = []

    def kernel(body, *, outputs, **_):
        def run(*operands):
            moved.extend(_size(jax.typeof(x)) * (2 if _is_ref(x) else 1) for x in operands)
            moved.extend(map(_size, outputs))
            return tuple(jnp.zeros(out.shape, out.dtype) for out in outputs)

        return run

    function, arguments = build(jax.ShapeDtypeStruct, **program.kwargs)
    with mock.patch.object(bridge, "kernel", kernel):
        jax.eval_shape(function, *arguments)
    return sum(moved)


def floor(program) -> int:
    """Count the least: every parameter read, the state read and written, hidden states in, the update out."""
    _, (hidden, *others) = build(jax.ShapeDtypeStruct, **program.kwargs)
    state, rest = others[:3], others[3:]
    update = program.b * program.d * 4
    return _size(hidden) + 2 * sum(map(_size, state)) + sum(map(_size, rest)) + update


def _is_ref(x) -> bool:
    return "Ref" in type(jax.typeof(x)).__name__


def _size(array) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize
