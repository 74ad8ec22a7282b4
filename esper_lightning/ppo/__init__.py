"""The algorithm PPO: one file for each phase of an iteration. Lightning is never imported here."""
