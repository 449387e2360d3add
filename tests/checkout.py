"""Make the checkout importable where it is not installed: a machine with a GPU may have no network.

Importing this module makes `mamba2_jax` importable, and the kernels in `pallas/` as `mamba2_jax.pallas`.
"""

import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]

if importlib.util.find_spec("mamba2_jax") is None:
    sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("mamba2_jax.pallas") is None:
    import mamba2_jax

    mamba2_jax.__path__.append(str(ROOT))
