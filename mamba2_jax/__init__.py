"""Mamba-2 for people who work in JAX."""
