"""Simulators that return five tensors: Isaac Lab, ManiSkill, mjlab. Axes: ``B`` environment.

Such simulators are recognised by their members and never imported.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_lightning.core.errors import Words, require, require_members
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.types import Observation
from esper_lightning.envs.adapters.curriculum import pass_progress
from esper_lightning.envs.adapters.simulated import Simulator, Stepped
from esper_lightning.envs.adapters.spaces import MASK, action_box, read_action_space
from esper_lightning.envs.adapters.tensors import (
    FreshLog,
    read_boxes,
    read_count,
    read_device,
    read_extras,
    require_results,
    require_tensors,
    takes_seed,
    to_groups,
    to_range,
)
from esper_lightning.envs.base import RunProgress

__all__ = ["TorchSimulator"]

_MEMBERS = ("num_envs", "device", "single_action_space", "reset", "step")
_FINAL = ("final_obs", "final_observation", "terminal_observation")


class TorchSimulator(Simulator):
    """A simulator with ``step(action) -> obs, reward, terminated, truncated, extras``.

    Args:
        env: The simulator, or a wrapper of it, which is reset once to read its observation space.
        seed: Seed of that reset; ``None`` where the simulator has been seeded already.
        name: Name of the task in errors.
    """

    def __init__(self, env: Any, seed: int | None, *, name: str) -> None:
        self._env, self.name = env, name
        raw = getattr(env, "unwrapped", env)
        rule = "be a simulator that returns five tensors, with " + ", ".join(_MEMBERS)
        require_members(name, raw, _MEMBERS, rule)
        self.reseeds = takes_seed(env.reset)
        self.num_envs = read_count(raw, "num_envs", name=name)
        self.device = read_device(raw, name=name)
        self.resets_itself = _resets_itself(env, raw)
        obs = self.reset(None, seed)
        masked = isinstance(obs, dict) and MASK in obs
        action = raw.single_action_space
        discrete = hasattr(action, "n") or hasattr(action, "nvec")
        self.spaces = EnvSpaces(
            obs=read_boxes(obs),
            action=read_action_space(action) if discrete else action_box(action),
            masked=masked,
        )
        self._to_range = to_range(action, self.device)
        self._fresh = FreshLog()

    def reset(self, rows: Tensor | None, seed: int | None) -> Observation:
        """Start new episodes everywhere, or in the rows, which become numbers of environments."""
        if rows is None:
            seeded = {} if seed is None or not self.reseeds else {"seed": seed}
            return self._first(self._env.reset(**seeded))
        numbers = rows.nonzero()[:, 0]
        try:
            return self._first(self._env.reset(env_ids=numbers))  # mjlab
        except TypeError:
            return self._first(self._env.reset(options={"env_idx": numbers}))  # ManiSkill

    def step(self, action: Tensor) -> Stepped:
        """Act in every environment."""
        field = f"{self.name}.step()"
        rule = "return obs, reward, terminated, truncated, extras"
        results = self._env.step(self._to_range(action))
        obs, *flags, extras = require_results(results, (5,), field=field, rule=rule)
        require_tensors(*flags, num_envs=self.num_envs, field=field)
        reward, terminated, truncated = flags
        extras = read_extras(extras, field=field)
        final = next((extras[name] for name in _FINAL if extras.get(name) is not None), None)
        reached = None if final is None else to_groups(final, field=field)
        log = self._fresh.of(extras, field=field)
        return Stepped(to_groups(obs, field=field), reward, terminated, truncated, reached, log)

    def _first(self, results: Any) -> Observation:
        field = f"{self.name}.reset()"
        rule = "return a tuple of observations and extras"
        return to_groups(require_results(results, (2,), field=field, rule=rule)[0], field=field)

    @property
    def frames_per_s(self) -> float:
        """Pictures of ``render`` for a second of the simulated time."""
        metadata: Mapping[str, Any] = getattr(self._env, "metadata", None) or {}
        return float(metadata.get("render_fps") or 30.0)

    def render(self) -> Tensor:
        """Pictures ``[B, H, W, 3]`` of all environments.

        Raises:
            ValueError: If the simulator draws none, or one picture for several environments.
        """
        render = getattr(self._env, "render", None)
        pictures: Any = render() if callable(render) else None
        form = "none" if pictures is None else list(np.shape(pictures))
        if pictures is not None and self.num_envs == 1 and len(form) == 3:
            pictures, form = pictures[None], [1, *form]
        rule = "return pictures of all environments as uint8 [B, H, W, 3]"
        hint = "It may have to be made with render_mode='rgb_array'."
        ok = len(form) == 4 and form[0] == self.num_envs
        require(ok, f"{self.name}.render()", rule, Words(str(form)), hint)
        return pictures if isinstance(pictures, Tensor) else torch.from_numpy(np.asarray(pictures))

    def begin_iteration(self, progress: RunProgress) -> None:
        """Pass the progress of the run to the simulator, if it has ``begin_iteration``."""
        pass_progress(self._env, progress)

    def close(self) -> None:
        """Close the simulator if it has ``close``."""
        if hasattr(self._env, "close"):
            self._env.close()


def _resets_itself(env: Any, raw: Any) -> bool:
    """Whether ``step`` resets the environments whose episode ended.

    The outermost wrapper that has ``auto_reset`` decides, as in ManiSkill, then the settings, as in
    mjlab. ManiSkill's environments without such a wrapper, known by ``elapsed_steps``, reset
    nothing; Isaac Lab's do, and say nothing.
    """
    metadata: Mapping[str, Any] = getattr(env, "metadata", None) or {}
    mode = metadata.get("autoreset_mode", "SameStep")
    if str(getattr(mode, "value", mode)) != "SameStep":
        return False
    layer, layers = env, [env]
    while layer is not raw:
        own: dict[str, Any] = getattr(layer, "__dict__", {})
        layer = own.get("env", own.get("_env", raw))
        layers.append(layer)
    for layer in layers:
        if isinstance(found := getattr(layer, "auto_reset", None), bool):
            return found
    settings = getattr(raw, "cfg", None)
    return bool(getattr(settings, "auto_reset", not hasattr(raw, "elapsed_steps")))
