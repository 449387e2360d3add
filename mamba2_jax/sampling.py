"""The old path of `mamba2_jax.generation.sampling`; it goes with the next release."""

import sys
import warnings

from mamba2_jax.generation import sampling

warnings.warn("mamba2_jax.sampling is now mamba2_jax.generation.sampling", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = sampling
