"""The old path of `mamba2_jax.models.mamba2`; it goes with the next release."""

import sys
import warnings

from mamba2_jax.models import mamba2

warnings.warn("mamba2_jax.model is now mamba2_jax.models.mamba2", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = mamba2
