"""Who takes part in `benchmarks/ssd.py`: ours, and the peers that are installed, each behind the same calls.

A contestant takes the inputs as numpy arrays and gives two functions that only queue work on the device:
`forward()` gives y, and `step()` gives y and the gradients of x, dt, A, B, C and D for a given gradient of y.
"""

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mamba2_jax import ops
from mamba2_jax.ops.scan import dispatch

NAMES = ("x", "dt", "A", "B", "C", "D")


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    ours: bool
    make: Callable[[dict, np.ndarray], "Entry"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contestant with its inputs on the device."""

    forward: Callable[[], Any]
    step: Callable[[], Any]
    wait: Callable[[Any], Any]
    numpy: Callable[[Any], Any]  # a forward's or a step's result as float32 arrays


def draw(shape, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs of a scan in the ranges of a trained layer, and a gradient of y."""
    rng = np.random.default_rng(seed)
    b, l, h, p, g, n = shape.b, shape.l, shape.h, shape.p, shape.g, shape.n
    dtype = np.dtype(getattr(ml_dtypes, shape.dtype, shape.dtype))

    def normal(*size):
        return rng.standard_normal(size, np.float32)

    inputs = {
        "x": normal(b, l, h, p).astype(dtype),
        "dt": np.log1p(np.exp(normal(b, l, h) - 2)),
        "A": -rng.uniform(1, 4, h).astype(np.float32),
        "B": (normal(b, l, g, n) / n**0.5).astype(dtype),
        "C": normal(b, l, g, n).astype(dtype),
        "D": normal(h),
    }
    return inputs, normal(b, l, h, p).astype(dtype)


def contestants(shape, small: bool) -> Iterator[Contestant | str]:
    """Those that can run this shape here; for the others, the reason."""
    problem = dispatch.describe(shape.dtype, shape.b, shape.l, shape.h, shape.p, shape.g, shape.n)
    for name, kernel in dispatch.kernels("ssd").items():
        reason = kernel.unsupported(problem)
        yield f"{name}: {reason}" if reason else _ours(name)
    yield _ours("xla")
    if small:
        yield _ours("recurrent")
        return
    for name, package, module, make in PEERS:
        if importlib.util.find_spec(module) is None:
            yield f"{name}: not installed"
        else:
            yield Contestant(f"{name} {importlib.metadata.version(package)}", False, make)


def _ours(implementation: str) -> Contestant:
    def scan(arrays):
        return ops.ssd(**arrays, implementation=implementation)[0]

    return Contestant(implementation, True, lambda inputs, dy: with_jax(scan, inputs, dy))


def with_jax(scan: Callable[[dict], jax.Array], inputs: dict, dy: np.ndarray) -> Entry:
    arrays, cotangent = jax.tree.map(jnp.asarray, (inputs, dy))

    @jax.jit
    def step(arrays, cotangent):
        y, vjp = jax.vjp(scan, arrays)
        return y, vjp(cotangent)[0]

    forward = jax.jit(scan)
    return Entry(
        forward=lambda: forward(arrays),
        step=lambda: step(arrays, cotangent),
        wait=jax.block_until_ready,
        numpy=lambda result: jax.tree.map(lambda a: np.asarray(a, np.float32), result),
    )


def _jax_linear_attention(inputs: dict, dy: np.ndarray) -> Entry:
    from jla.layers.ssm import mamba2_ssd  # pyright: ignore[reportMissingImports]

    def scan(a):
        return mamba2_ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], d=a["D"], grouped_key_grads=True)[0]

    return with_jax(scan, inputs, dy)


def _mamba_ssm(inputs: dict, dy: np.ndarray) -> Entry:
    import torch
    from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
        mamba_chunk_scan_combined,
    )

    def tensor(array):
        dtype = getattr(torch, array.dtype.name)
        return torch.tensor(np.asarray(array, np.float32), device="cuda").to(dtype)

    tensors = {name: tensor(inputs[name]).requires_grad_() for name in NAMES}
    cotangent = tensor(dy)

    def scan():
        x, dt, A, B, C, D = tensors.values()
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D)

    @torch.no_grad()
    def forward():
        return scan()

    def step():
        y = scan()
        gradients = torch.autograd.grad(y, list(tensors.values()), cotangent)
        return y.detach(), dict(zip(NAMES, gradients, strict=True))

    return Entry(
        forward=forward,
        step=step,
        wait=lambda _: torch.cuda.synchronize(),
        numpy=lambda result: jax.tree.map(lambda a: a.float().cpu().numpy(), result),
    )


PEERS = (
    ("jax-linear-attention", "jax-linear-attention", "jla", _jax_linear_attention),
    ("mamba_ssm (Triton)", "mamba_ssm", "mamba_ssm", _mamba_ssm),
)
