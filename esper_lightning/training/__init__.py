"""The Lightning module of PPO and what it is made of."""
