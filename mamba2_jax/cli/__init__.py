"""The command `mamba2-jax`."""

from mamba2_jax.cli.commands import main

__all__ = ["main"]
