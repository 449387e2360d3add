"""The scan on Hopper GPUs, by Pallas Mosaic GPU."""
