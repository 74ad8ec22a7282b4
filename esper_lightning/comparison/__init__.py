"""Runs against runs: what each scored, paired over seeds. Without torch."""
