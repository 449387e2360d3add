"""Run `mamba2-jax` as `python -m mamba2_jax.cli`, where the script is not installed."""

import sys

from mamba2_jax.cli.commands import main

sys.exit(main())
