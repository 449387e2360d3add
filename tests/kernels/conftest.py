"""The kernels' tests need no GPU: an interpreter on the CPU, and ahead-of-time compilers."""

import os

# The interpreter runs each warpgroup on a thread of XLA's pool, and they wait for each other. On a machine
# with two cores the pool is too small for a kernel's three warpgroups. Read when the CPU backend starts.
os.environ.setdefault("NPROC", "16")
