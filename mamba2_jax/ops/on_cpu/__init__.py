"""What is there for XLA on a CPU only, each piece with the measurement that justifies it."""
