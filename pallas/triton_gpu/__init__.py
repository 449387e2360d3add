"""The scan on Ampere and Ada GPUs, by Triton kernels through jax_triton."""
