"""Simulators of tensors, with the returns and lengths of their episodes. Axes: ``B`` environment.

An adapter implements how its simulator is reset and stepped (``Simulator``). ``SimulatedEnv``
counts episodes, and copies tensors that a simulator may overwrite.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper_lightning.core.errors import Words, require, require_members
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import Box, EnvSpaces
from esper_lightning.core.tensor_trees import map_obs
from esper_lightning.core.types import Observation, StepResult
from esper_lightning.envs.adapters.spaces import MASK
from esper_lightning.envs.adapters.stateless import Lost, StatelessEnv
from esper_lightning.envs.adapters.tensors import require_tensors
from esper_lightning.envs.base import RunProgress

__all__ = ["SimulatedEnv", "Simulator", "Stepped"]


_MEMBERS = ("num_envs", "spaces", "device", "name", "reset", "step")  # of a Simulator


class Stepped(NamedTuple):
    """Results of a step on the simulator's device, which the simulator may overwrite later.

    An observation may hold a group ``action_mask``, which becomes the mask of the step.
    """

    obs: Observation  # reached by the action; with ``resets_itself`` the next episode's first
    reward: Float[Tensor, " B"]
    terminated: Shaped[Tensor, " B"]
    truncated: Shaped[Tensor, " B"]  # may overlap with terminated
    reached: Observation | None = None  # read with ``resets_itself`` where an episode ended
    log: Mapping[str, Any] = {}  # metrics of the simulator; empty where none are new


class Simulator(ABC):
    """The interface that an adapter of a simulator implements.

    Attributes:
        num_envs: Number of environments, ``B``.
        spaces: Observation and action spaces of one environment.
        device: Device of the simulator's tensors.
        name: Name of the task in errors.
        resets_itself: Whether ``step`` has already reset the environments whose episode ended.
        reseeds: Whether ``reset`` takes a seed. Otherwise the simulator is seeded when it is made.
    """

    num_envs: int
    spaces: EnvSpaces
    device: torch.device
    name: str = "Simulator"
    resets_itself: bool = False
    reseeds: bool = True

    @abstractmethod
    def reset(self, rows: Bool[Tensor, " B"] | None, seed: int | None) -> Observation:
        """Start new episodes.

        Args:
            rows: Environments to reset; ``None`` for all. Rows of other environments in the result
                are not read.
            seed: Seed of all random numbers from now on; ``None`` to continue without a new seed.
        """

    @abstractmethod
    def step(self, action: Shaped[Tensor, "B *A"]) -> Stepped:
        """Act in every environment."""

    def begin_iteration(self, progress: RunProgress) -> None:  # noqa: B027 - most have none
        """Set a curriculum, which must depend on the progress of the run alone."""

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release processes, windows and memory."""


class SimulatedEnv(StatelessEnv):
    """A ``BatchedEnv`` around a simulator.

    Args:
        simulator: The simulator, which ``close`` closes.
        seed: Seed of the first reset; ``None`` where the simulator has been seeded already.
        lost: Rule for truncated episodes whose last observation the simulator does not return:
            take the ``previous`` observation, as rsl_rl does, or raise an ``error``.

    Raises:
        ValueError: If the simulator lacks an attribute of ``Simulator``.

    Attributes:
        num_envs: Number of environments, ``B``.
        spaces: Observation and action spaces of one environment.
    """

    names_come_late = True  # metrics are known only once the simulator has logged them

    def __init__(self, simulator: Simulator, seed: int | None, *, lost: Lost = "error") -> None:
        rule = f"be a Simulator, with {', '.join(_MEMBERS)}"
        require_members(type(simulator).__name__, simulator, _MEMBERS, rule)
        super().__init__(simulator.name, seed, reseeds=simulator.reseeds)
        self.simulator, self._lost = simulator, lost
        self.num_envs, self.spaces = simulator.num_envs, simulator.spaces
        self._device = simulator.device
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._restart_books()

    @torch.no_grad()
    def reset(self) -> tuple[Observation, Bool[Tensor, "B K"] | None]:
        """Start a new episode everywhere."""
        self._restart_books()
        seed = self.take_seed()
        self._obs, mask = self._own(self.simulator.reset(None, seed))
        return self._obs, mask

    @torch.no_grad()
    def step(self, action: Shaped[Tensor, "B *A"]) -> StepResult:
        """Act in every environment, and reset those whose episode ended."""
        stepped = self.simulator.step(action)
        got = Words(type(stepped).__name__)
        name = f"{self.simulator.name}.step()"
        require(isinstance(stepped, Stepped), name, "return a Stepped", got)  # pyright: ignore[reportUnnecessaryIsInstance]
        flags = stepped.reward, stepped.terminated, stepped.truncated
        require_tensors(*flags, num_envs=self.num_envs, field=name)
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
        """Means of the metrics that the simulator logged since the last call.

        Each is the mean over the logs that have its name, and NaN if there is none. A name that was
        logged once is there in every iteration that follows.
        """
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums = {name: torch.zeros_like(total) for name, total in self._sums.items()}
        self._counts.clear()
        return means

    def begin_iteration(self, progress: RunProgress) -> None:
        """Pass the progress of the run to the simulator."""
        self.simulator.begin_iteration(progress)

    @property
    def frames_per_s(self) -> float:
        """Pictures of ``render`` for a second of the simulated time; 30 if it is not known."""
        return float(getattr(self.simulator, "frames_per_s", 30.0))

    def render(self) -> Shaped[Tensor, "B H W 3"]:
        """Pictures of all environments, uint8, by the simulator's own ``render()``.

        Raises:
            ValueError: If the simulator has no such method.
        """
        render = getattr(self.simulator, "render", None)
        owner, rule = self.simulator.name, "have a method render() -> uint8 [B, H, W, 3]"
        require(callable(render), owner, f"{rule} to be shown", "none")
        assert render is not None
        return render()

    def close(self) -> None:
        """Release the simulator's processes, windows and memory."""
        self.simulator.close()

    def _restart_books(self) -> None:
        self._return = torch.zeros(self.num_envs, dtype=torch.float64, device=self._device)
        self._length = torch.zeros(self.num_envs, dtype=torch.int64, device=self._device)

    def _reached(
        self, reached: Observation | None, obs: Observation, ended: Tensor, truncated: Tensor
    ) -> Observation:
        """Observations reached in a step by all environments of a simulator that resets itself."""
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
        """The observation in new tensors, in the dtypes of their boxes, and the action mask."""
        boxes, mask = self.spaces.obs, None
        groups = obs if isinstance(obs, dict) else {"": obs}
        if MASK in groups:
            mask = groups[MASK].bool().clone()
            groups = {name: value for name, value in groups.items() if name != MASK}
        alone = isinstance(boxes, Box)
        if isinstance(boxes, Box):
            boxes = {next(iter(groups)): boxes}
        lacks = [name for name in boxes if name not in groups]
        rule = f"have the groups of its spaces, {', '.join(boxes)}"
        require(not lacks, f"{self.simulator.name}'s observations", rule, list(groups))
        own = {name: self._copy(groups[name], box) for name, box in boxes.items()}
        return next(iter(own.values())) if alone else own, mask

    def _copy(self, value: Tensor, box: Box) -> Tensor:
        dtype = torch.uint8 if box.dtype == "uint8" else torch.float32
        copied = value.detach().to(dtype, copy=True)
        copied = copied[:, None] if copied.dim() == 1 else copied  # one number is a vector
        shape, got = [self.num_envs, *box.shape], list(copied.shape)
        require(got == shape, f"{self.simulator.name}'s observations", f"have shape {shape}", got)
        return copied

    def _add(self, log: Mapping[str, Any]) -> None:
        for name, value in log.items():
            key = str(name).replace("/", "_")
            number = self._mean(value, name)
            self._sums[key] = self._sums.get(key, torch.zeros_like(number)) + number
            self._counts[key] += 1

    def _mean(self, value: Any, name: object) -> Float[Tensor, ""]:
        try:
            return torch.as_tensor(value, dtype=torch.float32, device=self._device).mean()
        except (TypeError, ValueError, RuntimeError):  # text, None, a ragged list
            field, rule = f"{self.simulator.name}'s metric {name!r}", "be numbers"
            require(False, field, rule, value)
            raise


def _choose(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(where.view(-1, *[1] * (old.dim() - 1)), new, old)
