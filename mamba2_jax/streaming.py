"""The old path of `mamba2_jax.generation.streaming`; it goes with the next release."""

import sys
import warnings

from mamba2_jax.generation import streaming

warnings.warn("mamba2_jax.streaming is now mamba2_jax.generation.streaming", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = streaming
