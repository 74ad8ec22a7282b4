"""PPO as a LightningModule, with its settings, counters, checkpoints and exports."""
