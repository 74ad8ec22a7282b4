"""What runs that are replayed die of: an environment and a callback, as users have them."""

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback

from esper_lightning.envs import CartPole
from esper_lightning.envs.autoreset import AutoresetEnv
from esper_lightning.envs.morphogenesis.lifecycle import Stage


def _raise() -> None:
    raise RuntimeError("injected")


FAULTS = {
    "raise": _raise,
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "native": lambda: ctypes.string_at(0),
}


def rank_of_process() -> int:
    """Number of this rank, by the variables that launchers set."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


@dataclass(frozen=True, kw_only=True)
class Faulty(CartPole):
    """CartPole that fails once, in a step of one rollout.

    Attributes:
        fault: ``nan`` (in a reward), one of ``FAULTS``, or ``state``: an error as soon as a cart is
            far from the middle after that rollout has begun.
        at: Number of the rollout, from 1; 0 for never.
        on_rank: Rank on which it fails.
    """

    fault: str = "nan"
    at: int = 0
    on_rank: int = 0

    def build(self, device: torch.device, seed: int) -> AutoresetEnv:
        return FaultyEnv(self, device=device, seed=seed)


class FaultyEnv(AutoresetEnv):
    def __init__(self, task: Faulty, *, device: torch.device, seed: int) -> None:
        self.task, self.rollouts, self.steps = task, 0, 0
        super().__init__(task, device=device, seed=seed)
        # The environments of an evaluation are not those of the training.
        self.watches = task.num_envs > 4 and task.on_rank == rank_of_process()

    def reset(self) -> Any:
        first = super().reset()
        self.rollouts = 0
        return first

    def draw(self, steps: int) -> Any:
        self.rollouts, self.steps = self.rollouts + 1, 0
        return super().draw(steps)

    def transition(self, episodes: Any, action: Any, initial: Any) -> Any:
        self.steps += 1
        after, result = super().transition(episodes, action, initial)
        task = self.task
        if not self.watches or task.at == 0:
            return after, result
        if task.fault == "state":
            if self.rollouts >= task.at and bool((result.obs[:, 0].abs() > 0.15).any()):
                raise ValueError("a cart is far from the middle")
        elif self.rollouts == task.at and self.steps >= 3:
            if task.fault == "nan":
                reward = result.reward.clone()
                reward[1] = float("nan")
                return after, result._replace(reward=reward)
            FAULTS[task.fault]()
        return after, result

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**super().state_dict(), "rollouts": torch.tensor(self.rollouts)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        state = dict(state)
        self.rollouts = int(state.pop("rollouts"))
        super().load_state_dict(state)


class Dies(Callback):
    """A callback of a user's, which dies at the end of an iteration; -1 stands for all ranks."""

    def __init__(self, at: int, fault: str = "raise", on_rank: int = 0) -> None:
        self.at, self.fault, self.on_rank = at, fault, on_rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.at and self.on_rank in (-1, trainer.global_rank):
            FAULTS[self.fault]()


class DiesSlowly(Dies):
    """Dies likewise, of a run whose iterations take long."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        time.sleep(0.3)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class DiesWhileBlending(Callback):
    """Dies at the end of an iteration in which some host blends a module in."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        stage = pl_module._learner._env.state_dict()["slots.stage"]
        if trainer.global_step >= 4 and bool((stage == Stage.BLENDING).any()):
            raise RuntimeError("while blending")
