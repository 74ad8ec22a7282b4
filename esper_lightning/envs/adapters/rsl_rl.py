"""Simulators with rsl_rl's interface: Genesis, legged_gym, unitree_rl_gym.

Such simulators are recognised by their members and never imported. Axes: ``B`` environment.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import torch
from torch import Tensor

from esper_lightning.core.errors import Words, require, require_members
from esper_lightning.core.spaces import Box, EnvSpaces
from esper_lightning.core.types import Observation
from esper_lightning.envs.adapters.curriculum import pass_progress
from esper_lightning.envs.adapters.simulated import Simulator, Stepped
from esper_lightning.envs.adapters.tensors import (
    FreshLog,
    read_boxes,
    read_count,
    read_device,
    read_extras,
    require_results,
    require_tensors,
    to_groups,
)
from esper_lightning.envs.base import RunProgress

__all__ = ["RslRlSimulator"]

_MEMBERS = ("num_envs", "num_actions", "device", "get_observations", "step")


class RslRlSimulator(Simulator):
    """A simulator with ``step(action) -> obs, reward, done, extras``.

    legged_gym and its descendants return privileged observations, or None, between ``obs`` and
    ``reward``; nothing reads those. ``extras["time_outs"]`` says which episodes were truncated.
    Such simulators do not return the observation that an episode reached.

    Args:
        env: The simulator.
        name: Name of the task in errors.
    """

    resets_itself, reseeds = True, False

    def __init__(self, env: Any, *, name: str) -> None:
        self._env, self.name = env, name
        rule = f"be a simulator with rsl_rl's interface: {', '.join(_MEMBERS)}"
        require_members(name, env, _MEMBERS, rule)
        self.num_envs = read_count(env, "num_envs", name=name)
        self.device = read_device(env, name=name)
        actions = read_count(env, "num_actions", name=name)
        obs = read_boxes(self._groups(env.get_observations(), "get_observations()"))
        self.spaces = EnvSpaces(obs=obs, action=Box((actions,)))
        self._fresh = FreshLog()

    def reset(self, rows: Tensor | None, seed: int | None) -> Observation:  # noqa: ARG002
        """Start new episodes everywhere; such simulators are seeded when they are made."""
        obs = self._env.reset() if hasattr(self._env, "reset") else self._env.get_observations()
        return self._groups(obs, "reset()")

    def step(self, action: Tensor) -> Stepped:
        """Act in every environment."""
        field = f"{self.name}.step()"
        rule = "return obs, reward, done, extras, or privileged observations after obs"
        results = require_results(self._env.step(action), (4, 5), field=field, rule=rule)
        obs, *privileged, reward, done, extras = results
        require(not any(map(_is_flat, privileged)), field, rule, Words("other results"))
        require_tensors(reward, done, num_envs=self.num_envs, field=field)
        extras, done = read_extras(extras, field=field), done.bool()
        time_outs = extras.get("time_outs")
        time_outs = torch.zeros_like(done) if time_outs is None else time_outs
        require_tensors(time_outs, num_envs=self.num_envs, field=field)
        truncated = time_outs.bool() & done
        log = self._fresh.of(extras, field=field)
        groups = self._groups(obs, "step()")
        return Stepped(groups, reward, done & ~truncated, truncated, None, log)

    def _groups(self, obs: Any, method: str) -> Observation:
        """The observation, which old versions return first in a tuple with others."""
        first = obs[0] if isinstance(obs, tuple) else obs
        return to_groups(first, field=f"{self.name}.{method}")

    def begin_iteration(self, progress: RunProgress) -> None:
        """Pass the progress of the run to the simulator, if it has ``begin_iteration``."""
        pass_progress(self._env, progress)

    def close(self) -> None:
        """Close the simulator if it has ``close``."""
        if hasattr(self._env, "close"):
            self._env.close()


def _is_flat(value: Any) -> bool:
    """Whether a value has one number per environment, as rewards and flags have."""
    return isinstance(value, Tensor) and value.dim() < 2
