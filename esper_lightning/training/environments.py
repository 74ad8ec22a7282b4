"""The environments of a run: built together with their learner, and closed when the run ends."""

from contextlib import suppress

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from esper_lightning.core.ranks import Ranks
from esper_lightning.core.running_stats import RunningStats
from esper_lightning.core.seeding import stream, stream_seed
from esper_lightning.envs.base import closed_after_error
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.learner import Learner
from esper_lightning.training.settings import PPOSettings

__all__ = ["RunEnvironments", "build_learner"]


def build_learner(
    settings: PPOSettings,
    agent: Agent,
    return_stats: RunningStats | None,
    *,
    iteration: int,
    device: torch.device,
    rank: int,
    ranks: Ranks,
) -> Learner:
    """Build the environments, the rollout storage and the random streams of one rank.

    Args:
        settings: Settings of the module.
        agent: Agent that acts and is trained.
        return_stats: Statistics of discounted returns; ``None`` leaves rewards as they are.
        iteration: Number of iterations that the module, or its checkpoint, has finished so far.
        device: Device of environments, agent and storage.
        rank: Number of this rank, which has random streams of its own.
        ranks: All ranks of the run.
    """

    def name(purpose: str) -> str:  # a later or resumed fit does not repeat the first one's noise
        return f"{purpose} from iteration {iteration}"

    seed, spec = settings.seed, settings.env
    env = spec.build(device, stream_seed(seed, rank=rank, purpose=name("environments")))
    with closed_after_error(env, spec):
        return Learner(
            spec,
            env,
            agent,
            settings.ppo,
            return_stats,
            exploration=stream(seed, rank=rank, purpose=name("acting"), device=device),
            sample_order=stream(seed, rank=rank, purpose=name("order"), device=device),
            mode=settings.compile,
            device=device,
            ranks=ranks,
        )


class RunEnvironments(Callback):
    """Opens the environments of a ``PPO`` module for a fit, and closes them however a run ends.

    A callback, since a user's module may have hooks of its own.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the environments, after a checkpoint has been restored."""
        pl_module.open_environments()  # pyright: ignore[reportCallIssue]

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if native code was no longer right in the last iterations of a run."""
        _call(pl_module, "look_at_stages")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the environments after a run that finished."""
        _call(pl_module, "close_environments")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say the same of a run that an error or a signal ended, and close its environments."""
        with suppress(BaseException):  # the run ends by its own error, and environments are closed
            _call(pl_module, "look_at_stages")
        _call(pl_module, "close_environments")


def _call(module: LightningModule, name: str) -> None:
    method = getattr(module, name, None)
    if callable(method):
        method()
