"""The trained policy that a command plays or exports: its option, and the checkpoint in it."""

import argparse
from pathlib import Path
from typing import NamedTuple

from esper_lightning.training.checkpoint.states import checkpoint_at
from esper_lightning.training.module import PPO

__all__ = ["TrainedPolicy", "add_policy_option", "load_policy"]


class TrainedPolicy(NamedTuple):
    """A trained module, and where it comes from."""

    path: Path
    """Path of the checkpoint."""
    model: PPO
    """Module with the weights of the checkpoint, on the CPU and without extensions."""


def add_policy_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--ckpt_path``, which ``load_policy`` takes."""
    parser.add_argument(
        "--ckpt_path", required=True, help="a checkpoint, or a run directory for its best one"
    )


def load_policy(ckpt_path: str) -> TrainedPolicy:
    """Load the policy of a checkpoint.

    Extensions are of use in training alone, and their classes may not be installed here.

    Args:
        ckpt_path: Path of a checkpoint, or of a run directory for its best checkpoint.

    Raises:
        ValueError: If there is no checkpoint of PPO.
    """
    path = checkpoint_at(ckpt_path)
    return TrainedPolicy(path, PPO.load_from_checkpoint(path, map_location="cpu", extensions=()))
