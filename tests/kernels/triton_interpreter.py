"""Triton's interpreter under JAX: a launch becomes a callback that runs the kernel on numpy arrays.

It computes float32 and float16 as a GPU would; its bfloat16 is wrong (an error of the interpreter).
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when `triton.jit` decorates the kernels

import jax
import numpy as np
from triton.runtime import interpreter

_NAMES = {"float32": "fp32", "float16": "fp16", "int32": "i32"}


def _patch_tensor(tensor, scope, original=interpreter._patch_lang_tensor):
    original(tensor, scope)
    # numpy 2.4 no longer converts arrays of shape (1,), which the interpreter's scalars are
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor


class Buffer:
    """A numpy array with as much of a CPU torch.Tensor as the interpreter asks for."""

    def __init__(self, array: np.ndarray):
        self.array = np.ascontiguousarray(array)
        self.dtype = _NAMES[array.dtype.name]
        self.shape = array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.data_ptr() == self.data_ptr()

    def new_empty(self, *_, **__):
        return Buffer(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self):
        return self.array.itemsize


def launch(kernel, inputs, outputs, grid, *, num_warps, num_stages, **constants):
    """Do what `triton_call.launch` does, on the CPU. Outputs start as NaN: what is not written shows."""
    scalars = {i: value for i, value in enumerate(inputs) if isinstance(value, int)}
    arrays = [value for value in inputs if not isinstance(value, int)]

    def run(*arrays):
        arguments = [Buffer(np.array(array)) for array in arrays]
        for i, value in sorted(scalars.items()):
            arguments.insert(i, value)
        results = [Buffer(np.full(out.shape, np.nan, out.dtype)) for out in outputs]
        kernel[grid](*arguments, *results, **constants)
        return [result.array for result in results]

    return jax.pure_callback(run, outputs, *arrays)
