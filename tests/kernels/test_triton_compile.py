"""The Triton kernels compiled for A100, L4 and H100: registers, spills and shared memory in their budgets."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from triton_compile import CONFIGURATIONS

SCRIPT = pathlib.Path(__file__).with_name("triton_compile.py")
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # what a program may ask for
# Bytes of stack a thread may spill, of 255 registers: next to nothing where models are trained (16 bytes in
# one of the kernels on an L4). 256 states and float32 do not fit; float32 is not taken unasked.
SPILLS = {("bfloat16", 256): 128, ("float32", 128): 2304}
# every configuration on an A100, the one of most models on all three
CASES = [(80, index) for index in range(len(CONFIGURATIONS))] + [(89, 0), (90, 0)]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the Triton kernels need triton"),
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax >= 0.11.2"),
]


@pytest.mark.parametrize(("capability", "index"), CASES)
def test_compiles_within_its_budget(capability, index):
    dtype, _, state_dim, _ = CONFIGURATIONS[index]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(capability), str(index)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**environment, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kernel["kernel"] for kernel in found] == ["forward", "states", "backward", "chunks"]
    for kernel in found:
        assert kernel["stack"] <= SPILLS.get((dtype, state_dim), 16), kernel
        assert kernel["shared"] <= SHARED[capability], kernel
        assert 0 < kernel["registers"] <= 255, kernel
        assert kernel["atomics"] == 0, kernel


@pytest.mark.parametrize("cache", [pytest.param("set", marks=pytest.mark.smoke), "unset"])
def test_lowers_through_jax_triton(cache, tmp_path):
    """And the folder in which all of the process's Triton kernels are kept stays what it was."""
    script = SCRIPT.with_name("triton_lowering.py")
    ours = ("TRITON_INTERPRET", "TRITON_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)} if cache == "set" else {}
    done = subprocess.run(
        [sys.executable, str(script), "80"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    # two pieces: forward twice; backward: forward twice, backward twice, and the chunks
    assert done.stdout.split() == ["7", str(tmp_path) if cache == "set" else "None"]
