"""The state space scan: its public functions, its implementations, and the choice among them."""
