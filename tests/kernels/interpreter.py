"""Run a kernel on the CPU with every checker on, and say what they found."""

import contextlib

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from mamba2_jax.pallas.mosaic_gpu import bridge


class Found(AssertionError):
    """What a checker found: "a race", "a barrier" or "unwritten"."""


@contextlib.contextmanager
def _recorded_races():
    """Collect races over all kernels of a computation; the interpreter forgets them at each new kernel."""
    races = []

    class Recorder(gpu_callbacks.GPURaceDetectionState):
        def __setattr__(self, name, value):
            if name == "races_found" and value:
                races.append(self)
            super().__setattr__(name, value)

    original = gpu_callbacks.GPURaceDetectionState
    gpu_callbacks.GPURaceDetectionState = Recorder
    try:
        yield races
    finally:
        gpu_callbacks.GPURaceDetectionState = original
        gpu_callbacks.reset_gpu_interpret_mode_state()


def run(function, *args, **kwargs):
    """Return `function(*args, **kwargs, interpret=...)`, having checked it.

    Memory is NaN until written, so an output that a kernel left out is not finite.

    Raises:
        Found: warpgroups or copies raced, a barrier was completed that nobody waited for or waited for out of
            turn, or an output element was not written.
    """
    with _recorded_races() as races:
        try:
            outputs = jax.block_until_ready(function(*args, **kwargs, interpret=bridge.interpreter()))
        except jax.errors.JaxRuntimeError as error:
            said = str(error).strip().splitlines()[-1]
            if "barrier" not in said.lower():
                raise
            raise Found(f"a barrier out of step: {said}") from error
    if races:
        raise Found("a race: what the interpreter printed says where")
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        unwritten = ~np.isfinite(np.asarray(leaf, np.float64))
        if unwritten.any():
            where = np.argwhere(unwritten)
            raise Found(f"unwritten: {len(where)} elements of output {path}, the first at {where[0]}")
    return outputs
