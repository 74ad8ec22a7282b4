"""A stack of the latest observations as the observation, around any batched environment.

Axes: ``B`` environment, ``T`` step, ``F`` frame, ``*O`` observation.
"""

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from esper_lightning.core.errors import check_fields, require, require_int
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import Box, ChannelOrder, EnvSpaces, channel_axis
from esper_lightning.core.types import Observation, StepResult
from esper_lightning.envs.base import (
    BatchedEnv,
    EnvSpec,
    FunctionalEnv,
    closed_after_error,
    is_functional,
    spec_name,
    takes_num_envs,
)

__all__ = ["FrameStack", "FrameStackEnv"]

Frames = dict[str, Tensor]
"""The stack of each stacked group by its name; by the name ``""`` without groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameStack(EnvSpec):
    """The latest observations of other environments, stacked into one observation.

    Images are stacked along their channels: four frames ``[84, 84, 3]`` become ``[84, 84, 12]``.
    Images without channels ``[H, W]`` become ``[F, H, W]``, and vectors ``[O]`` become ``[F * O]``.
    The newest frame is the last. At the beginning of an episode all frames are the first one.

    Attributes:
        env: Spec of the environments whose observations are stacked.
        frames: Number of frames ``F``.
        groups: Names of the observation groups that are stacked. ``None`` means all groups, or the
            whole observation where there are no groups.
        channel_order: Place of the channels in the shape of an image: ``first`` for ``[C, H, W]``,
            ``last`` for ``[H, W, C]``. ``auto`` takes the first or last axis if it is shorter than
            both other axes, and refuses all other images.
    """

    env: EnvSpec
    frames: int = 4
    groups: tuple[str, ...] | None = None
    channel_order: ChannelOrder = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        require_int("FrameStack.frames", self.frames, minimum=1)

    @property
    def num_envs(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``B``: number of environments on each rank."""
        return self.env.num_envs

    @property
    def name(self) -> str:
        """Name of the task in messages and run directories."""
        return spec_name(self.env)

    @property
    def shared(self) -> bool:
        """Whether one simulator serves training and evaluation."""
        return bool(getattr(self.env, "shared", False))

    @property
    def random_streams(self) -> tuple[str, ...] | None:
        """Random streams in the state; ``None`` if the state of the environments has no rows."""
        streams: tuple[str, ...] | None = getattr(self.env, "random_streams", None)
        return None if streams is None else tuple(f"env.{name}" for name in streams)

    def spaces(self) -> EnvSpaces:
        """Spaces of the environments, with stacked observations.

        Raises:
            ValueError: If a group does not exist, or no axis shows the channels of an image.
        """
        spaces = self.env.spaces()
        boxes = {"": spaces.obs} if isinstance(spaces.obs, Box) else dict(spaces.obs)
        stacked = {name: self._stacked(boxes[name]) for name in self.stacked_groups(spaces)}
        obs = stacked[""] if isinstance(spaces.obs, Box) else {**boxes, **stacked}
        return dataclasses.replace(spaces, obs=obs)

    def build(self, device: torch.device, seed: int) -> BatchedEnv:
        """Build the environments, with an empty stack of frames."""
        env = self.env.build(device, seed)
        kind = FunctionalFrameStackEnv if is_functional(env) else FrameStackEnv
        with closed_after_error(env, self.env):
            return kind(self, env, device)

    def release(self) -> None:
        """Release shared environments, which were built once more than they are used now."""
        release = getattr(self.env, "release", None)
        if callable(release):
            release()

    def evaluation_spec(self, episodes: int) -> "FrameStack":
        """The spec of an evaluation: the stacked environments as they are evaluated themselves."""
        env, own_rule = self.env, getattr(self.env, "evaluation_spec", None)
        if callable(own_rule):
            env = cast(EnvSpec, own_rule(episodes))
        elif takes_num_envs(env):
            env = cast(EnvSpec, dataclasses.replace(cast(Any, env), num_envs=episodes))
        return dataclasses.replace(self, env=env)

    def rendering_spec(self) -> "FrameStack":
        """The spec of environments that draw pictures, as the stacked ones do themselves."""
        own_rule = getattr(self.env, "rendering_spec", None)
        env = cast(EnvSpec, own_rule()) if callable(own_rule) else self.env
        return dataclasses.replace(self, env=env)

    def stacked_groups(self, spaces: EnvSpaces) -> tuple[str, ...]:
        """Names of the groups of the environments that are stacked; ``""`` without groups.

        Raises:
            ValueError: If a group does not exist.
        """
        known = () if isinstance(spaces.obs, Box) else tuple(spaces.obs)
        for group in self.groups or ():
            rule = f"name groups of the observation ({', '.join(known) or 'it has none'})"
            require(group in known, "FrameStack.groups", rule, group)
        return (self.groups or known) if known else ("",)

    def axis(self, shape: tuple[int, ...]) -> int:
        """The axis of an observation without the axis ``B`` along which frames are joined."""
        if len(shape) == 3:
            return channel_axis(shape, self.channel_order, owner="FrameStack")
        return 0

    def _stacked(self, box: Box) -> Box:
        shape = list(frame_shape(box.shape))
        shape[self.axis(box.shape)] *= self.frames
        bounds = [
            bound * self.frames if isinstance(bound, tuple) else bound
            for bound in (box.low, box.high)
        ]
        return Box(tuple(shape), bounds[0], bounds[1], dtype=box.dtype)


class FrameStackEnv:
    """The environments of ``FrameStack``.

    Optional members, such as ``close`` and ``reseed``, are those of the environments within.

    Args:
        spec: Settings of the stack.
        env: Environments whose observations are stacked.
        device: Device of the environments.
    """

    def __init__(self, spec: FrameStack, env: BatchedEnv, device: torch.device) -> None:
        self._env = env
        self.num_envs, self.spaces = spec.num_envs, spec.spaces()
        inner = spec.env.spaces()
        boxes = {"": inner.obs} if isinstance(inner.obs, Box) else inner.obs
        stacked = {"": self.spaces.obs} if isinstance(self.spaces.obs, Box) else self.spaces.obs
        self._count = spec.frames
        # With the axis B. These tensors are never returned, so that a graph can be captured.
        self._axes = {n: 1 + spec.axis(boxes[n].shape) for n in spec.stacked_groups(inner)}
        self._shapes = {name: frame_shape(boxes[name].shape) for name in self._axes}
        self._frames: Frames = {
            name: torch.zeros(
                self.num_envs,
                *stacked[name].shape,
                dtype=getattr(torch, stacked[name].dtype),
                device=device,
            )
            for name in self._axes
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before ``__init__`` there is nothing to forward to
            raise AttributeError(name)
        return getattr(self._env, name)

    @torch.no_grad()
    def reset(self) -> tuple[Observation, Bool[Tensor, "B K"] | None]:
        """Start a new episode everywhere."""
        obs, mask = self._env.reset()
        first = self._first(obs)
        self._store(first)
        return self._observation(obs, first), mask

    @torch.no_grad()
    def step(self, action: Shaped[Tensor, "B *A"]) -> StepResult:
        """Act in every environment."""
        frames, result = self._stack(self._frames, self._env.step(action))
        self._store(frames)
        return result

    def metrics(self) -> dict[str, Float[Tensor, ""]]:
        """Metrics of the environments within; none if these have no metrics."""
        own = getattr(self._env, "metrics", None)
        return cast(dict[str, Tensor], own()) if callable(own) else {}

    def state_dict(self) -> dict[str, Tensor] | None:
        """The state of the environments within, and the frames; ``None`` without such a state."""
        state = self._env.state_dict()
        if state is None:
            return None
        own = {f"frames.{name}": frames.clone() for name, frames in self._frames.items()}
        return {**{f"env.{name}": value for name, value in state.items()}, **own}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state_dict`` bit for bit.

        Raises:
            ValueError: If the state comes from environments of another size.
        """
        for name, frames in self._frames.items():
            got = state.get(f"frames.{name}")
            shape = None if got is None else list(got.shape)
            field, rule = f"FrameStack.load_state_dict()['frames.{name}']", "have shape"
            require(shape == list(frames.shape), field, f"{rule} {list(frames.shape)}", shape)
        inner = {n.removeprefix("env."): v for n, v in state.items() if n.startswith("env.")}
        self._env.load_state_dict(inner)
        self._store({name: state[f"frames.{name}"] for name in self._frames})

    def _store(self, frames: Frames) -> None:
        for name, buffer in self._frames.items():
            if buffer is not frames[name]:
                buffer.copy_(frames[name])

    def _newest(self, obs: Observation, name: str) -> Tensor:
        """The frame of a group, with a channel where the image has none."""
        group = obs if isinstance(obs, Tensor) else obs[name]
        return group.view(len(group), *self._shapes[name]).to(self._frames[name].dtype)

    def _first(self, obs: Observation) -> Frames:
        """The stacks of episodes that begin with an observation."""
        return {
            name: torch.cat([self._newest(obs, name)] * self._count, axis)
            for name, axis in self._axes.items()
        }

    def _stack(self, frames: Frames, result: StepResult) -> tuple[Frames, StepResult]:
        """The stacks after a step, and the result of the step with stacked observations."""
        ended = result.terminated | result.truncated
        first = self._first(result.obs)
        reached: Frames = {}
        for name, axis in self._axes.items():
            old, new = frames[name], self._newest(result.reached_obs, name)
            size = new.shape[axis]
            kept = old.narrow(axis, size, old.shape[axis] - size)
            reached[name] = torch.cat([kept, new], axis)
        after = {
            name: torch.where(ended.view(-1, *[1] * (old.dim() - 1)), first[name], old)
            for name, old in reached.items()
        }
        return after, result._replace(
            obs=self._observation(result.obs, after),
            reached_obs=self._observation(result.reached_obs, reached),
        )

    @staticmethod
    def _observation(obs: Observation, stacks: Frames) -> Observation:
        return stacks[""] if isinstance(obs, Tensor) else {**obs, **stacks}


class FunctionalFrameStackEnv(FrameStackEnv):
    """The environments of ``FrameStack`` around environments whose step is a pure function."""

    _env: FunctionalEnv

    def episodes(self) -> Any:
        """The episodes of the environments within, and the frames."""
        return self._env.episodes(), self._frames

    def keep(self, episodes: Any) -> None:
        """Store ``episodes`` as the current episodes."""
        self._env.keep(episodes[0])
        self._store(episodes[1])

    def draw(self, steps: int) -> Any:
        """Random numbers of the environments within for the next ``T`` steps."""
        return self._env.draw(steps)

    def transition(
        self, episodes: Any, action: Shaped[Tensor, "B *A"], drawn: Any
    ) -> tuple[Any, StepResult]:
        """One step from ``episodes``, as a pure function."""
        inner, result = self._env.transition(episodes[0], action, drawn)
        frames, result = self._stack(episodes[1], result)
        return (inner, frames), result


def frame_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a frame: images without channels and numbers get an axis to be joined along."""
    return (1, *shape) if len(shape) in (0, 2) else shape
