"""Batched environments for tasks that are equations, with a time limit and a reset within the step.

Axes: ``B`` environment, ``S`` component of the simulator's state. A step is the same tensor
operations whatever happens in it: there is no branch on a value and no host synchronisation, and
all random numbers are sampled before, so that a rollout can be compiled or captured whole. For the
same reason a step does not check the values of actions.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from esper_lightning.core.errors import check_fields, require, require_int, require_members
from esper_lightning.core.shapes import Bool, Float, Int, Shaped, UInt8
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.types import Observation, StepResult

__all__ = ["RANDOM_STREAMS", "AutoresetEnv", "Episodes", "Task", "Transition", "validate_sizes"]


class Episodes(NamedTuple):
    """Everything that a step changes: the running episodes."""

    state: Float[Tensor, "B S"]
    elapsed: Int[Tensor, " B"]  # steps so far
    episode_return: Float[Tensor, " B"]  # so far


class Transition(NamedTuple):
    """State, reward and termination that an action led to, before any reset."""

    state: Float[Tensor, "B S"]
    reward: Float[Tensor, " B"]
    terminated: Bool[Tensor, " B"]


RANDOM_STREAMS = ("generator",)
"""Names of the random streams in the state of an ``AutoresetEnv``, for its spec to declare."""


@runtime_checkable
class Task(Protocol):
    """A spec that also holds the equations: pure functions that keep the dtype of the state.

    States are of a floating dtype. No method writes into its arguments; ``observe`` may return the
    state itself.
    """

    @property
    def num_envs(self) -> int:
        """``B``: number of environments on each rank."""
        ...

    @property
    def time_limit(self) -> int:
        """Steps after which an episode is truncated."""
        ...

    def spaces(self) -> EnvSpaces:
        """Spaces of observations and actions, without action masks."""
        ...

    def sample_states(
        self, steps: int, generator: torch.Generator, device: torch.device
    ) -> Float[Tensor, "T B S"]:
        """Initial states for ``T`` steps of every environment; sampled for every step, so cheap."""
        ...

    def observe(self, state: Float[Tensor, "B S"]) -> Observation:
        """Observation ``[B, *O]`` of a state."""
        ...

    def advance(self, state: Float[Tensor, "B S"], action: Shaped[Tensor, "B *A"]) -> Transition:
        """One step of the dynamics."""
        ...


_TASK_MEMBERS = ("num_envs", "time_limit", "spaces", "sample_states", "observe", "advance")


class AutoresetEnv:
    """``BatchedEnv`` of a ``Task``; it can be stepped without a ``reset`` before.

    Args:
        task: The equations, and the number of environments.
        device: Device of all tensors.
        seed: Seed of the initial states.

    Raises:
        ValueError: If ``task`` lacks a member of ``Task``, its initial states have another shape
            than ``Task.sample_states`` says or are not floating, or ``seed`` is no integer of at
            least 0.

    Attributes:
        generator: Random stream of the initial states.
    """

    def __init__(self, task: Task, *, device: torch.device, seed: int) -> None:
        self._owner = type(task).__name__
        _require_task(task)
        require_int(f"{self._owner}.build().seed", seed, minimum=0)
        self._task = task
        self._device = device
        self._spaces = task.spaces()
        self.generator = torch.Generator(device=device).manual_seed(seed)
        # These tensors are never returned, only written in place, so that a graph can be captured.
        self._episodes = self._first_episodes()

    @property
    def num_envs(self) -> int:
        """``B``: number of environments on each rank."""
        return self._task.num_envs

    @property
    def spaces(self) -> EnvSpaces:
        """Spaces of observations and actions."""
        return self._spaces

    def reseed(self, seed: int) -> None:
        """Continue as environments that are built with this seed."""
        self.generator.manual_seed(seed)
        self.keep(self._first_episodes())

    @torch.no_grad()
    def reset(self) -> tuple[Observation, None]:
        """Start a new episode everywhere."""
        state = self.draw(1)[0]
        self._episodes.state.copy_(state)
        self._episodes.elapsed.zero_()
        self._episodes.episode_return.zero_()
        return self._task.observe(state), None

    @torch.no_grad()
    def step(self, action: Shaped[Tensor, "B *A"]) -> StepResult:
        """Act in every environment; start a new episode where one ended."""
        episodes, result = self.transition(self._episodes, action, self.draw(1)[0])
        self.keep(episodes)
        return result

    @property
    def frames_per_s(self) -> float:
        """Pictures that show a second, by the attribute of the task."""
        return float(getattr(self._task, "frames_per_s", 30.0))

    @torch.no_grad()
    def render(self) -> UInt8[Tensor, "B H W 3"]:
        """Pictures of all environments, by the method ``render(state)`` of the task.

        Raises:
            ValueError: If the task has no such method.
        """
        render = getattr(self._task, "render", None)
        rule = "have a method render(state) -> uint8 [B, H, W, 3] to be shown"
        require(callable(render), self._owner, rule, "none")
        assert render is not None
        return render(self._episodes.state)

    # The same as pure functions, for rollouts that are compiled.

    def episodes(self) -> Episodes:
        """The state of all environments, in tensors whose addresses never change."""
        return self._episodes

    def keep(self, episodes: Episodes) -> None:
        """Store ``episodes`` as the current episodes."""
        for buffer, value in zip(self._episodes, episodes, strict=True):
            if buffer is not value:
                buffer.copy_(value)

    def draw(self, steps: int) -> Float[Tensor, "T B S"]:
        """Sample initial states for the next ``T`` steps from the random stream.

        On a CPU one call for ``T`` steps returns the same numbers as ``T`` calls for one step.
        """
        return self._task.sample_states(steps, self.generator, self._device)

    def transition(
        self, episodes: Episodes, action: Shaped[Tensor, "B *A"], initial: Float[Tensor, "B S"]
    ) -> tuple[Episodes, StepResult]:
        """One step from ``episodes``, as a pure function; ended ones start from ``initial``."""
        outcome: Any = self._task.advance(episodes.state, action)
        if not _is_triple(outcome):
            require(False, f"{self._owner}.advance()", "return a Transition", outcome)
        reached, reward, terminated = outcome
        is_of_envs = reward.shape == terminated.shape == episodes.elapsed.shape
        if not (is_of_envs and reached.shape == episodes.state.shape):  # they would broadcast
            self._refuse_shapes(Transition(reached, reward, terminated), episodes)
        elapsed = episodes.elapsed + 1
        episode_return = episodes.episode_return + reward
        truncated = (elapsed >= self._task.time_limit) & ~terminated
        ended = terminated | truncated
        running = ~ended
        state = torch.where(ended.unsqueeze(-1), initial, reached)
        after = Episodes(
            state, elapsed.masked_fill(ended, 0), episode_return.masked_fill(ended, 0.0)
        )
        return after, StepResult(
            obs=self._task.observe(state),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            reached_obs=self._task.observe(reached),
            action_mask=None,
            episode_return=episode_return.masked_fill(running, math.nan),
            episode_length=elapsed.masked_fill(running, 0),
        )

    def _first_episodes(self) -> Episodes:
        states: Any = self.draw(1)
        field, rule = f"{self._owner}.sample_states()", "return states [T, B, S]"
        ok = isinstance(states, Tensor) and states.dim() == 3
        ok = ok and states.shape[:2] == (1, self.num_envs)
        got = list(states.shape) if isinstance(states, Tensor) else states
        require(ok, field, f"{rule}, with T = 1 and B = {self.num_envs} here", got)
        require(states.is_floating_point(), field, "return floating states", states.dtype)
        zeros = torch.zeros(self.num_envs, dtype=torch.int64, device=self._device)
        return Episodes(states[0], zeros, zeros.to(states.dtype))

    def _refuse_shapes(self, outcome: Transition, episodes: Episodes) -> None:
        expected = Transition(episodes.state, episodes.elapsed, episodes.elapsed)
        for name, got, like in zip(Transition._fields, outcome, expected, strict=True):
            rule = f"have shape {list(like.shape)}"
            require(
                got.shape == like.shape, f"{self._owner}.advance().{name}", rule, list(got.shape)
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of simulator state, episode accumulators and random stream."""
        buffers = {name: buffer.clone() for name, buffer in self._episodes._asdict().items()}
        return {**buffers, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state_dict`` bit for bit.

        Raises:
            ValueError: If the state comes from an environment of another size, another task or
                another kind of device; the environment is then unchanged.
        """
        field = f"{self._owner}.load_state_dict()"
        expected = {**self._episodes._asdict(), "generator": self.generator.get_state()}
        require(state.keys() == expected.keys(), field, f"get {sorted(expected)}", sorted(state))
        for name, tensor in expected.items():
            rule = f"be {tensor.dtype} of shape {list(tensor.shape)}"
            got = (state[name].dtype, list(state[name].shape))
            hint = "The state was saved with another num_envs, task or kind of device."
            require(
                got == (tensor.dtype, list(tensor.shape)), f"{field}[{name!r}]", rule, got, hint
            )
        for name, buffer in self._episodes._asdict().items():
            buffer.copy_(state[name])
        self.generator.set_state(state["generator"].cpu())


def _is_triple(outcome: object) -> bool:
    return isinstance(outcome, tuple) and len(cast(tuple[object, ...], outcome)) == 3


def validate_sizes(task: Task) -> None:
    """Check the types of all settings and the two sizes that every task has; for ``__post_init__``.

    Raises:
        ValueError: If a member of ``Task`` is missing, a size is not an integer of at least 1, or a
            setting is of another type than its annotation.
    """
    _require_task(task)
    owner = type(task).__name__
    if dataclasses.is_dataclass(task):
        check_fields(task)
    require_int(f"{owner}.num_envs", task.num_envs, minimum=1)
    require_int(f"{owner}.time_limit", task.time_limit, minimum=1)


def _require_task(task: object) -> None:
    rule = f"be a Task, with {', '.join(_TASK_MEMBERS)}"
    require_members(type(task).__name__, task, _TASK_MEMBERS, rule)
