"""Shapes in signatures are checked at run time here, in the rooms whose inputs the public doors validate."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")

_CHECKED = ["mamba2_jax.ops.ssd_chunked", "mamba2_jax.ops.ssd_recurrent", "mamba2_jax.ops.segments"]
_hook = install_import_hook(_CHECKED, "beartype.beartype")
