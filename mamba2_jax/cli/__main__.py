"""`python -m mamba2_jax.cli`: the command where it is not installed as a script."""

import sys

from mamba2_jax.cli.commands import main

sys.exit(main())
