"""These tests need an NVIDIA GPU. `make gpu` runs them alone; in a run of all tests they are skipped."""

import jax
import pytest


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs an NVIDIA GPU, and this process runs on {jax.default_backend()}; see make gpu")
