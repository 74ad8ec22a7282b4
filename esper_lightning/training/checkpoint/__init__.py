"""Checkpoints: their files, and the state of PPO in them."""
