"""Memory that a CPU's training keeps: steps without page faults."""

import json
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.xla_habits,
    pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc"),
]

PROGRAM = """
import json, resource, sys
import jax, jax.numpy as jnp
from mamba2_jax.training import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None

@jax.jit
def step(x):  # two products of 64 MB, one needed for the other
    return jnp.sum((x @ x.T) @ x)

x = jnp.ones((4096, 16))
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps({"kept": kept, "faults": faults[2:]}))
"""


def page_faults(option: str) -> dict:
    done = subprocess.run([sys.executable, "-c", PROGRAM, option], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_finds_the_memory_of_the_one_before():
    without, kept = page_faults("plain"), page_faults("keep")
    if min(without["faults"]) < 10_000:
        pytest.skip(f"this C library keeps it anyway: {without['faults']} page faults a step")
    assert kept["kept"] is True
    assert max(kept["faults"]) < 1000
