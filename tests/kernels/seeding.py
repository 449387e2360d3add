"""Plant a bug in a kernel, to see that the checkers find it."""

import contextlib
import inspect

from mamba2_jax.pallas.bridge import plgpu


@contextlib.contextmanager
def without(name, caller):
    """Leave out the calls of `plgpu.<name>` that the function named `caller` makes."""
    original = getattr(plgpu, name)
    left_out = []

    def patched(*args, **kwargs):
        if inspect.currentframe().f_back.f_code.co_name != caller:
            return original(*args, **kwargs)
        left_out.append(caller)
        return None

    setattr(plgpu, name, patched)
    try:
        yield
    finally:
        setattr(plgpu, name, original)
    assert left_out, f"{caller} does not call {name}: no bug was planted"
