"""One of two hosts, of which one is refused: ``python refused.py DIRECTORY REFUSED``."""

import sys

import torch
from lightning.pytorch import Trainer

from esper_lightning import PPO, PPOConfig
from esper_lightning.core.errors import require
from esper_lightning.envs import CartPole
from esper_lightning.recorder.flight_recorder import FlightRecorder
from esper_lightning.training.checkpoint.meeting import tells_other_ranks


def main(directory, refused):
    torch.set_num_threads(1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        callbacks=[FlightRecorder(directory)],
    )
    with tells_other_ranks(trainer):
        require(not refused, "PPOConfig.clip", "be other", 1.0)
    trainer.fit(PPO(CartPole(num_envs=4), ppo=PPOConfig(rollout_steps=8)))


if __name__ == "__main__":
    main(*sys.argv[1:])
