"""``WindowProfiler``, and what becomes of its traces."""
