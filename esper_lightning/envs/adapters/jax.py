"""Simulators written in JAX: pure functions over a batch, whose arrays are used without a copy.

Axes: ``B`` environment. Environments are reset here, because resets of the simulators lose the
observation that an episode reached, or return to the same first state. JAX is imported where a
simulator is built.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportMissingImports=false, reportMissingTypeStubs=false

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from esper_lightning.core.errors import require, require_int
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces, ObsSpace
from esper_lightning.core.types import Observation
from esper_lightning.envs.adapters.named import SEEDS, NamedSpec, require_package
from esper_lightning.envs.adapters.simulated import SimulatedEnv, Simulator, Stepped
from esper_lightning.envs.adapters.spaces import ONE_HOT

__all__ = ["Brax", "Gymnax", "JaxSimulator"]

_INSTALL = "'esper_lightning[jax]'"
_PLAYGROUND = "'esper_lightning[playground]'"

Draw = Callable[[Any], Any]


class JaxSimulator(Simulator):
    """``B`` copies of an environment that consists of two pure functions.

    Args:
        spaces: Observation and action spaces of one environment.
        reset: Function ``key -> (state, obs)``.
        step: Function ``(key, state, action) -> (state, obs, reward, terminated, truncated)``,
            which resets nothing.
        num_envs: Number of environments, ``B``.
        seed: Seed of all random numbers.
        device: Device of the tensors, on which JAX computes, too.
        name: Name of the task in errors.
        time_limit: Steps after which an episode is truncated; ``None`` where ``step`` truncates.
        draw: Function from the state of one environment to its picture, a ``uint8`` array ``[H, W,
            3]``; ``None`` where none can be drawn.
        frames_per_s: Steps in a second of the simulated time.
    """

    resets_itself = True

    def __init__(
        self,
        spaces: EnvSpaces,
        reset: Callable[..., Any],
        step: Callable[..., Any],
        *,
        num_envs: int,
        seed: int,
        device: torch.device,
        name: str,
        time_limit: int | None = None,
        draw: Draw | None = None,
        frames_per_s: float = 30.0,
    ) -> None:
        jax: Any = importlib.import_module("jax")
        jnp: Any = importlib.import_module("jax.numpy")

        self.spaces, self.num_envs, self.device, self.name = spaces, num_envs, device, name
        self._jax, self._draw, self.frames_per_s = jax, draw, frames_per_s
        place = jax.devices("cpu" if device.type == "cpu" else "gpu")[device.index or 0]
        self._place = place
        self._restart_random(seed)
        self._running: Any = None

        def choose(where: Any, new: Any, old: Any) -> Any:
            def rows(a: Any, b: Any) -> Any:
                if a.shape[:1] != (num_envs,):  # MuJoCo Warp's: of all environments together
                    return b
                return jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b)

            return jax.tree.map(rows, new, old)

        def begin(key: Any) -> Any:
            state, obs = jax.vmap(reset)(jax.random.split(key, num_envs))
            return (state, jnp.zeros(num_envs, jnp.int32)), obs

        def advance(running: Any, key: Any, action: Any) -> Any:
            state, elapsed = running
            key, step_key, reset_key = jax.random.split(key, 3)
            keys = jax.random.split(step_key, num_envs)
            state, reached, reward, terminated, truncated = jax.vmap(step)(keys, state, action)
            elapsed = elapsed + 1
            if time_limit is not None:
                truncated = truncated | (elapsed >= time_limit)
            ended = terminated | truncated
            running = state, elapsed
            # Resets are expensive: they are computed only in steps where an episode ended.
            fresh, first = jax.lax.cond(ended.any(), begin, lambda _: (running, reached), reset_key)
            running, obs = choose(ended, fresh, running), choose(ended, first, reached)
            return running, key, obs, reward, terminated, truncated, reached

        self._begin, self._advance = jax.jit(begin), jax.jit(advance)

    def reset(self, rows: Tensor | None, seed: int | None) -> Observation:  # noqa: ARG002
        """Start new episodes everywhere."""
        if seed is not None:
            self._restart_random(seed)
        self._key, key = self._jax.random.split(self._key)
        self._running, obs = self._begin(key)
        return self._tensors(obs)

    def step(self, action: Tensor) -> Stepped:
        """Act in every environment."""
        action = action.int() if action.dtype == torch.int64 else action  # JAX has no int64
        array = self._jax.dlpack.from_dlpack(action.contiguous())
        self._running, self._key, *results = self._advance(self._running, self._key, array)
        return Stepped(*(self._tensors(result) for result in results))

    def render(self) -> Tensor:
        """Pictures ``[B, H, W, 3]`` of all environments, drawn one after the other.

        Raises:
            ValueError: If the environment draws none.
        """
        rule = "draw pictures to be shown"
        require(self._draw is not None, self.name, rule, "an environment without any")
        assert self._draw is not None
        (state, _), pictures = self._running, list[Any]()
        for row in range(self.num_envs):

            def of_row(array: Any, row: int = row) -> Any:
                return array[row] if array.shape[:1] == (self.num_envs,) else array

            pictures.append(self._draw(self._jax.tree.map(of_row, state)))
        return torch.from_numpy(np.stack(pictures).astype(np.uint8, copy=False))

    def _restart_random(self, seed: int) -> None:
        self._key = self._jax.device_put(self._jax.random.PRNGKey(seed % SEEDS), self._place)

    def _tensors(self, value: Any) -> Any:
        return self._jax.tree.map(torch.from_dlpack, value)


@dataclass(frozen=True, kw_only=True)
class _OfJax(NamedSpec):
    """What environments of JAX share: two functions become a batch."""

    __hash__ = NamedSpec.__hash__

    def evaluation_spec(self, episodes: int) -> "_OfJax":
        """Environments of an evaluation: at most those of training, each for several episodes."""
        return dataclasses.replace(self, num_envs=min(episodes, self.num_envs))

    def _compiled(
        self,
        reset: Callable[..., Any],
        step: Callable[..., Any],
        device: torch.device,
        seed: int,
        *,
        time_limit: int | None,
        draw: Draw | None = None,
        frames_per_s: float = 30.0,
    ) -> SimulatedEnv:
        simulator = JaxSimulator(
            self.spaces(),
            reset,
            step,
            num_envs=self.num_envs,
            seed=seed % SEEDS,
            device=device,
            name=self.id,
            time_limit=time_limit,
            draw=draw,
            frames_per_s=frames_per_s,
        )
        return SimulatedEnv(simulator, None)


@dataclass(frozen=True, kw_only=True)
class Gymnax(_OfJax):
    """Environments of gymnax (Lange 2022), by their names; MinAtar is among them.

    Attributes:
        id: Name of the environment, such as ``Breakout-MinAtar``.
        num_envs: Environments on each rank.
        kwargs: Arguments of the environment.
    """

    __hash__ = NamedSpec.__hash__

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces of one environment.

        Raises:
            ValueError: If there is no such environment, gymnax is not installed, or a space has no
                counterpart.
        """
        env, params = self._env()
        obs, action = env.observation_space(params), env.action_space(params)
        rule = "show one array"
        require(hasattr(obs, "shape"), f"Gymnax.id={self.id!r}", rule, type(obs).__name__)
        box = Box(tuple(int(n) for n in obs.shape) or (1,))
        if (choices := _choices(obs)) is not None:
            box = Box((choices,), *ONE_HOT)
        if hasattr(action, "n"):
            return EnvSpaces(obs=box, action=Discrete(int(action.n)))
        low, high = _bound(action.low), _bound(action.high)
        return EnvSpaces(obs=box, action=Box(tuple(action.shape), low, high))

    def build(self, device: torch.device, seed: int) -> SimulatedEnv:
        """Compile the environments for a device."""
        jax: Any = importlib.import_module("jax")

        env, params = self._env()
        choices = _choices(env.observation_space(params))

        def encode(obs: Any) -> Any:
            return obs.astype("float32") if choices is None else jax.nn.one_hot(obs, choices)

        def reset(key: Any) -> Any:
            obs, state = env.reset_env(key, params)
            return state, encode(obs)

        def step(key: Any, state: Any, action: Any) -> Any:
            obs, state, reward, ended, _ = env.step_env(key, state, action, params)
            if hasattr(env, "is_truncated"):  # from gymnax 1.0 on step_env never truncates
                terminated, truncated = ended, env.is_truncated(state, params)
            else:  # one flag is for both, and only the time limit distinguishes them
                limit = getattr(params, "max_steps_in_episode", None)
                truncated = ended & (False if limit is None else state.time >= limit)
                terminated = ended & ~truncated
            return state, encode(obs), reward.astype("float32"), terminated, truncated

        return self._compiled(reset, step, device, seed, time_limit=None)

    def _env(self) -> Any:
        gymnax = require_package(self, "gymnax", _INSTALL)
        try:
            return gymnax.make(self.id, **self.kwargs)
        except Exception as error:  # its class differs between versions
            raise self.refuse(error) from error


@dataclass(frozen=True, kw_only=True)
class Brax(_OfJax):
    """Environments of Brax (Freeman et al. 2021) or of MuJoCo Playground, by their names.

    Attributes:
        id: Name of the environment, such as ``ant`` or ``CartpoleBalance``.
        num_envs: Environments on each rank.
        time_limit: Steps after which an episode is truncated.
        suite: Collection that has the environment: ``brax`` or ``playground``.
        kwargs: Arguments of the environment. Those of Playground are ``config`` and
            ``config_overrides``, such as ``{"impl": "jax"}`` to compute without MuJoCo Warp.
    """

    time_limit: int = 1000
    suite: Literal["brax", "playground"] = "brax"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("Brax.time_limit", self.time_limit, minimum=1)

    __hash__ = NamedSpec.__hash__

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces of one environment.

        Raises:
            ValueError: If there is no such environment, or its package is not installed.
        """
        env = self._env()
        return EnvSpaces(
            obs=_boxes(env.observation_size), action=Box((int(env.action_size),), -1.0, 1.0)
        )

    def build(self, device: torch.device, seed: int) -> SimulatedEnv:
        """Compile the environments for a device."""
        jnp: Any = importlib.import_module("jax.numpy")

        env = self._env()

        def reset(key: Any) -> Any:
            state = env.reset(key)
            return state, state.obs

        def step(key: Any, state: Any, action: Any) -> Any:  # noqa: ARG001 - Brax has its own
            state = env.step(state, action)
            done = state.done > 0.5
            return state, state.obs, state.reward, done, jnp.zeros_like(done)

        def draw(state: Any) -> Any:
            drawn = state if self.suite == "playground" else state.pipeline_state
            return env.render([drawn])[0]

        return self._compiled(
            reset,
            step,
            device,
            seed,
            time_limit=self.time_limit,
            draw=draw,
            frames_per_s=1.0 / float(getattr(env, "dt", 1 / 30)),
        )

    def _env(self) -> Any:
        if self.suite == "playground":
            make = require_package(self, "mujoco_playground", _PLAYGROUND).registry.load
        else:
            make = require_package(self, "brax.envs", _INSTALL).get_environment
        try:
            return make(self.id, **self.kwargs)
        except Exception as error:  # its class differs between environments
            raise self.refuse(error) from error


def _choices(space: Any) -> int | None:
    """Number of values of a discrete space, which become one-hot columns; otherwise ``None``."""
    return int(space.n) if hasattr(space, "n") else None


def _bound(value: Any) -> float | tuple[float, ...]:
    """A bound of a box: one number, or one for each component of a flat shape."""
    every: list[float] = np.asarray(value, float).ravel().tolist()
    return every[0] if len(set(every)) == 1 else tuple(every)


def _boxes(size: Any) -> ObsSpace:
    """Boxes of an observation whose size is a number, a shape, or a mapping of these by group."""
    if isinstance(size, Mapping):
        return {str(name): _box(each) for name, each in size.items()}
    return _box(size)


def _box(size: Any) -> Box:
    return Box(tuple(np.atleast_1d(size).tolist()))
