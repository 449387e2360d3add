"""The causal convolution before the scan: on one device, and over a mesh."""
