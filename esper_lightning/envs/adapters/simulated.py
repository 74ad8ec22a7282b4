"""Simulators of tensors: the one place that keeps their episodes. Axes: ``B`` environment.

An adapter says how its simulator is reset and stepped (``Simulator``); episodes, their returns and
lengths, and the copies that nobody writes to again are made here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper_lightning.core.errors import require
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import Box, EnvSpaces
from esper_lightning.core.types import Observation, StepResult, map_obs
from esper_lightning.envs.adapters.host import Lost
from esper_lightning.envs.adapters.spaces import MASK

__all__ = ["SimulatedEnv", "Simulator", "Stepped"]


class Stepped(NamedTuple):
    """What a simulator makes of an action, on its device; it may write into all of it later.

    An observation may hold a group ``action_mask``, which is taken out of it.
    """

    obs: Observation  # what the action led to; with ``resets_itself`` the next episode's first
    reward: Float[Tensor, " B"]
    terminated: Shaped[Tensor, " B"]
    truncated: Shaped[Tensor, " B"]  # may overlap with terminated
    reached: Observation | None = None  # with ``resets_itself``: read where an episode ended
    log: Mapping[str, Any] = {}  # numbers of the simulator's own; empty where there is nothing new


class Simulator(ABC):
    """What an adapter implements.

    Attributes:
        num_envs: ``B``.
        spaces: What the environments show and take.
        device: Where their tensors are.
        name: Name of the task in errors.
        resets_itself: Whether ``step`` has already reset the environments whose episode ended.
    """

    num_envs: int
    spaces: EnvSpaces
    device: torch.device
    name: str = "Simulator"
    resets_itself: bool = False

    @abstractmethod
    def reset(self, rows: Bool[Tensor, " B"] | None, seed: int | None) -> Observation:
        """Start new episodes.

        Args:
            rows: Where; ``None`` for everywhere. Nobody reads the rows of other environments.
            seed: Seed of everything random from now on; ``None`` to go on with what there is.
        """

    @abstractmethod
    def step(self, action: Shaped[Tensor, "B *A"]) -> Stepped:
        """Act in every environment."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back processes, windows and memory."""


class SimulatedEnv:
    """A ``BatchedEnv`` of a simulator.

    Args:
        simulator: It is closed by ``close``.
        seed: Seed of the first reset; ``None`` where the simulator has been seeded already.
        lost: What an episode that was truncated is taken to have reached where the simulator does
            not say: the ``previous`` observation, which is the rule of rsl_rl, or an ``error``.

    Attributes:
        num_envs: ``B``.
        spaces: What the environments show and take.
    """

    names_come_late = True  # of metrics: a simulator logs what it likes, when it likes

    def __init__(self, simulator: Simulator, seed: int | None, *, lost: Lost = "error") -> None:
        self.simulator, self._seed, self._lost = simulator, seed, lost
        self.num_envs, self.spaces = simulator.num_envs, simulator.spaces
        self._device = simulator.device
        self._sums: dict[str, Tensor] = {}
        self._logged = 0
        self._restart_books()

    @torch.no_grad()
    def reset(self) -> tuple[Observation, Bool[Tensor, "B K"] | None]:
        """Start a new episode everywhere."""
        self._restart_books()
        seed, self._seed = self._seed, None
        self._obs, mask = self._own(self.simulator.reset(None, seed))
        return self._obs, mask

    @torch.no_grad()
    def step(self, action: Shaped[Tensor, "B *A"]) -> StepResult:
        """Act in every environment, and reset those whose episode ended."""
        stepped = self.simulator.step(action)
        reward = stepped.reward.float().clone()
        terminated = stepped.terminated.bool().clone()
        truncated = stepped.truncated.bool() & ~terminated
        ended = terminated | truncated
        obs, mask = self._own(stepped.obs)
        reached = obs
        if self.simulator.resets_itself:
            reached = self._reached(stepped.reached, obs, ended, truncated)
        elif bool(ended.any()):
            first, first_mask = self._own(self.simulator.reset(ended, None))
            obs = map_obs(partial(_choose, ended), first, reached)
            if mask is not None and first_mask is not None:
                mask = _choose(ended, first_mask, mask)
        total, length = self._return + reward.double(), self._length + 1
        self._return, self._length = total.masked_fill(ended, 0.0), length.masked_fill(ended, 0)
        self._obs = obs
        self._add(stepped.log)
        return StepResult(
            obs=obs,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            reached_obs=reached,
            action_mask=mask,
            episode_return=total.float().masked_fill(~ended, math.nan),
            episode_length=length.masked_fill(~ended, 0),
        )

    def metrics(self) -> dict[str, Float[Tensor, ""]]:
        """Means of what the simulator logged since the last call; NaN where it logged nothing.

        Names are those of the first log, so that every rank and every iteration has the same.
        """
        count = max(self._logged, 1)
        missing = math.nan if self._logged == 0 else 0.0
        means = {name: total / count + missing for name, total in self._sums.items()}
        self._sums = {name: torch.zeros_like(total) for name, total in self._sums.items()}
        self._logged = 0
        return means

    def reseed(self, seed: int) -> None:
        """Have the next reset seed everything random."""
        self._seed = seed

    def state_dict(self) -> None:
        """``None``: such simulators cannot say what they are in; a resumed run starts episodes."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """There is nothing that could be loaded.

        Raises:
            ValueError: Always.
        """
        rule = "not be restored: it has no state_dict"
        require(False, self.simulator.name, rule, sorted(state))

    def close(self) -> None:
        """Give back what the simulator holds."""
        self.simulator.close()

    def _restart_books(self) -> None:
        self._return = torch.zeros(self.num_envs, dtype=torch.float64, device=self._device)
        self._length = torch.zeros(self.num_envs, dtype=torch.int64, device=self._device)

    def _reached(
        self, reached: Observation | None, obs: Observation, ended: Tensor, truncated: Tensor
    ) -> Observation:
        """What every environment reached, of a simulator that has reset those that ended."""
        if reached is None:
            if self._lost == "error":
                hint = "Or set lost='previous', which takes the observation acted on."
                known = not bool(truncated.any())
                rule = "return final_obs where it truncates"
                require(known, self.simulator.name, rule, None, hint)
            reached = self._obs
        else:
            reached, _ = self._own(reached)
        return map_obs(partial(_choose, ended), reached, obs)

    def _own(self, obs: Observation) -> tuple[Observation, Tensor | None]:
        """Copies that nobody writes to again, as their boxes store them, and the action mask."""
        boxes, mask = self.spaces.obs, None
        groups = obs if isinstance(obs, dict) else {"": obs}
        if MASK in groups:
            mask = groups[MASK].bool().clone()
            groups = {name: value for name, value in groups.items() if name != MASK}
        if isinstance(boxes, Box):
            return _copy(next(iter(groups.values())), boxes), mask
        return {name: _copy(groups[name], box) for name, box in boxes.items()}, mask

    def _add(self, log: Mapping[str, Any]) -> None:
        if not log:
            return
        first = not self._sums
        self._logged += 1
        for name, value in log.items():
            key = str(name).replace("/", "_")
            if first or key in self._sums:
                number = torch.as_tensor(value, dtype=torch.float32, device=self._device).mean()
                self._sums[key] = self._sums.get(key, torch.zeros_like(number)) + number


def _copy(value: Tensor, box: Box) -> Tensor:
    dtype = torch.uint8 if box.dtype == "uint8" else torch.float32
    return value.detach().to(dtype, copy=True)


def _choose(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(where.view(-1, *[1] * (old.dim() - 1)), new, old)
