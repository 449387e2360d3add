"""Workarounds for XLA on a CPU, each with the measurement that justifies it."""
