"""The kernels' tests need no GPU: an interpreter on the CPU, and ahead-of-time compilers."""

import os

import jax

# The interpreter runs each warpgroup on a thread of XLA's pool, and they wait for each other. On a machine
# with two cores the pool is too small for a kernel's three warpgroups. Read when the CPU backend starts.
os.environ.setdefault("NPROC", "16")

if jax.__version_info__ < (0, 11, 2):  # it cannot run the kernels: `make test-kernels` has one that can
    collect_ignore_glob = ["*.py"]
