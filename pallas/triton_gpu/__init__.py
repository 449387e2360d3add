"""SSD scan on Ampere and Ada GPUs: Triton kernels, called through jax_triton."""
