"""Command line of the package: the program `mamba2-jax`."""

from mamba2_jax.cli.commands import main

__all__ = ["main"]
