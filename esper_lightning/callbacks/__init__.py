"""Callbacks of a run: history, checkpoints, progress, NaN guard, run directory, loggers."""
