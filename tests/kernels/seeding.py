"""Plant a bug in a kernel, to see that the checkers find it."""

import contextlib
import importlib.util
import inspect
import pathlib

from mamba2_jax.pallas.mosaic_gpu.bridge import plgpu


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


def rewritten(module, old, new, folder):
    """Return `module` with `old` replaced by `new` in its source, as a module of its own in `folder`."""
    source = pathlib.Path(module.__file__).read_text()
    assert old in source, f"{old} is not in {module.__name__}: no bug was planted"
    file = pathlib.Path(folder, "rewritten.py")
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("rewritten", file)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed
