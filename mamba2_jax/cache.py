"""The old path of `mamba2_jax.models.cache`; it goes with the next release."""

import sys
import warnings

from mamba2_jax.models import cache

warnings.warn("mamba2_jax.cache is now mamba2_jax.models.cache", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = cache
