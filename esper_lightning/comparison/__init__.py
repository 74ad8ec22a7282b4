"""Comparison of runs by their scores, paired over seeds; without torch."""
