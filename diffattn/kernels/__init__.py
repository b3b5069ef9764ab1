"""Pure functions on tensors: torch and triton only."""
