"""Checkpoints of PPO: how their files are written, and what they hold."""
