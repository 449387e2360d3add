"""Run the scan on Hopper GPUs by Pallas Mosaic GPU kernels."""
