"""How loops over tensors run: eagerly, compiled, or captured as a graph."""
