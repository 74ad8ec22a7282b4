"""Ways to run loops over tensors: eagerly, compiled, or captured as a CUDA graph."""
