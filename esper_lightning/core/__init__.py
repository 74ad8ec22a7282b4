"""Pure functions and records over tensors; torch only."""
