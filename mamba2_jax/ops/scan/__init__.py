"""The state space scan: public functions, implementations, and the choice of an implementation."""
