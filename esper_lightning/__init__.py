"""PPO with PyTorch Lightning over thousands of batched torch environments.

Names are imported when they are first used: reading the remains of a run needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
    from esper_lightning.callbacks.history import History
    from esper_lightning.callbacks.nan_guard import NanGuard
    from esper_lightning.callbacks.progress import RunProgressBar
    from esper_lightning.envs.check import check_env
    from esper_lightning.policies.composed import Composed
    from esper_lightning.policies.convolutional import CNN
    from esper_lightning.policies.feedforward import MLP
    from esper_lightning.policies.recurrent import Recurrent
    from esper_lightning.ppo.config import PPOConfig
    from esper_lightning.ppo.entropy_decay import EntropyDecay
    from esper_lightning.ppo.random_distillation import RND
    from esper_lightning.recorder.flight_recorder import FlightRecorder
    from esper_lightning.recorder.profiling.window_profiler import WindowProfiler
    from esper_lightning.replaying import replay
    from esper_lightning.train import train_ppo_vectorized
    from esper_lightning.trainer import Trainer
    from esper_lightning.training.checkpoint.files import AtomicCheckpointIO
    from esper_lightning.training.module import PPO
    from esper_lightning.training.video import VideoCallback

__all__ = [
    "CNN",
    "MLP",
    "PPO",
    "RND",
    "AtomicCheckpointIO",
    "BestCheckpoint",
    "Composed",
    "EntropyDecay",
    "FlightRecorder",
    "History",
    "LastCheckpoint",
    "NanGuard",
    "PPOConfig",
    "Recurrent",
    "RunProgressBar",
    "Trainer",
    "VideoCallback",
    "WindowProfiler",
    "check_env",
    "replay",
    "train_ppo_vectorized",
]

_HOMES = {
    "AtomicCheckpointIO": "training.checkpoint.files",
    "BestCheckpoint": "callbacks.checkpoints",
    "CNN": "policies.convolutional",
    "Composed": "policies.composed",
    "EntropyDecay": "ppo.entropy_decay",
    "FlightRecorder": "recorder.flight_recorder",
    "History": "callbacks.history",
    "LastCheckpoint": "callbacks.checkpoints",
    "MLP": "policies.feedforward",
    "NanGuard": "callbacks.nan_guard",
    "PPO": "training.module",
    "PPOConfig": "ppo.config",
    "RND": "ppo.random_distillation",
    "Recurrent": "policies.recurrent",
    "RunProgressBar": "callbacks.progress",
    "Trainer": "trainer",
    "VideoCallback": "training.video",
    "WindowProfiler": "recorder.profiling.window_profiler",
    "check_env": "envs.check",
    "replay": "replaying",
    "train_ppo_vectorized": "train",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
