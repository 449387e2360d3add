"""The old path of `mamba2_jax.weights.convert`; it goes with the next release."""

import sys
import warnings

from mamba2_jax.weights import convert

warnings.warn("mamba2_jax.convert is now mamba2_jax.weights.convert", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = convert
