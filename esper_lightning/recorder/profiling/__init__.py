"""``WindowProfiler``, its traces and its tables."""
