"""Vector environments of NumPy arrays, with the returns and lengths of their episodes.

Axes: ``B`` environment. Returns and lengths are counted in NumPy: at eight environments an
operation of torch costs more than a step of CartPole. Simulators end episodes in different ways.
Here all do the same: an environment is reset within the step that ended its episode, and the
observation which that step reached is returned with the first one of the next episode.
"""
# Simulators are recognised by their members and have no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_lightning.core.errors import require
from esper_lightning.core.shapes import Bool, Shaped, UInt8
from esper_lightning.core.spaces import mask_size
from esper_lightning.core.types import Observation, StepResult
from esper_lightning.envs.adapters.curriculum import pass_progress
from esper_lightning.envs.adapters.row_resets import require_reset_of_rows
from esper_lightning.envs.adapters.spaces import (
    MASK,
    action_encoder,
    group_spaces,
    idle_action,
    obs_encoder,
    read_spaces,
)
from esper_lightning.envs.adapters.stateless import Lost, StatelessEnv
from esper_lightning.envs.adapters.tensors import read_count
from esper_lightning.envs.base import RunProgress

__all__ = ["HostEnv", "VectorEnv", "require_mask_entry"]

Array = npt.NDArray[Any]
Groups = dict[str, Array]
_FINAL = ("final_obs", "final_observation")


@runtime_checkable
class VectorEnv(Protocol):
    """The methods that a simulator must have: Gymnasium's vector API."""

    num_envs: int
    single_observation_space: Any
    single_action_space: Any
    metadata: dict[str, Any]

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start new episodes, everywhere or where ``options["reset_mask"]`` is true."""
        ...

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Act in every environment."""
        ...

    def close(self) -> None:
        """Release processes, windows and memory."""
        ...


class _Seen(NamedTuple):
    """An encoded observation, and the mask of actions that are allowed."""

    groups: Groups
    mask: Array | None


class HostEnv(StatelessEnv):
    """A ``BatchedEnv`` around a vector environment.

    Args:
        env: The simulator, which ``close`` closes.
        device: Device of the tensors that are returned.
        seed: Seed of the first reset; ``None`` where the simulator has been seeded already.
        name: Name of the task in errors.
        mask: Entry of ``info`` that holds action masks, ``None`` for none. An environment without
            the entry in a step may take every action in the next one.
        lost: Rule for truncated episodes whose last observation the simulator does not return:
            take the ``previous`` observation, or raise an ``error``.
        resets_rows: Whether the simulator is known to reset single environments. Otherwise a reset
            of one environment is tried.
        keeps_bounds: Whether observations lie within the bounds of their space.
        reseeds: Whether a reset of the simulator takes a seed.
        hint: Way out for the error about a simulator that resets no single environments.

    Attributes:
        num_envs: Number of environments, ``B``.
        spaces: Observation and action spaces of one environment.

    Raises:
        ValueError: If a space has no counterpart, or the simulator neither returns the observation
            that an episode reached nor resets single environments, or resets them again in the next
            step. ``reset`` raises it if no environment has the entry of masks then.
    """

    def __init__(
        self,
        env: VectorEnv,
        device: torch.device,
        seed: int | None,
        *,
        name: str,
        mask: str | None = None,
        lost: Lost = "error",
        resets_rows: bool = False,
        keeps_bounds: bool = True,
        reseeds: bool = True,
        hint: str = "",
    ) -> None:
        super().__init__(name, seed, reseeds=reseeds)
        self._env, self._device = env, device
        self._mask_entry, self._lost = mask, lost
        self.num_envs = read_count(env, "num_envs", name=name)
        obs_space, action_space = env.single_observation_space, env.single_action_space
        self.spaces = read_spaces(
            obs_space, action_space, masked=mask is not None, keeps_bounds=keeps_bounds
        )
        self._encoders = {n: obs_encoder(space) for n, space in group_spaces(obs_space).items()}
        self._grouped = isinstance(self.spaces.obs, dict)
        self._to_action = action_encoder(action_space)
        given = env.metadata.get("autoreset_mode")
        mode = "NextStep" if given is None else str(getattr(given, "value", given))
        self._same_step = mode == "SameStep"
        # Some forget a reset and begin again in the next step. A single row can wait for that.
        alone = self.num_envs == 1 and not resets_rows
        self._resets_next = alone and given is not None and mode == "NextStep"
        self._idle = idle_action(action_space, self.num_envs)
        # Gymnasium's workers forget that they were reset, unless they share memory.
        forgets = mode == "NextStep" and getattr(env, "shared_memory", None) is False
        rule = "be made with shared_memory=True, or with autoreset_mode=SAME_STEP"
        require(not forgets, name, rule, type(env).__name__, "Its rows would be reset twice.")
        if not (self._same_step or resets_rows or self.num_envs == 1):
            require_reset_of_rows(env, seed, name=name, masked=self.spaces.masked, hint=hint)
        self._latest = _Seen({}, None)
        self._restart_books()

    def reset(self) -> tuple[Observation, Bool[Tensor, "B K"] | None]:
        """Start a new episode everywhere."""
        self._restart_books()
        seed = self.take_seed()
        obs, info = self._env.reset() if seed is None else self._env.reset(seed=seed)
        if self._mask_entry is not None:
            require_mask_entry(self._mask_entry, info)
        self._latest = self._see(obs, info)
        return self._observation(self._latest.groups), self._mask(self._latest)

    def step(self, action: Shaped[Tensor, "B *A"]) -> StepResult:
        """Act in every environment, and reset those whose episode ended."""
        given = self._to_action(action.detach().cpu().numpy())
        obs, reward, terminated, truncated, info = self._env.step(given)
        before, seen = self._latest, self._see(obs, info)
        reward = np.array(reward, np.float64)
        terminated = np.array(terminated, bool)
        truncated = np.asarray(truncated, bool) & ~terminated
        ended = terminated | truncated
        self._return += reward
        self._length += 1
        episode_return = np.full(self.num_envs, math.nan, np.float32)
        episode_length = np.zeros(self.num_envs, np.int64)
        reached = seen.groups
        if ended.any():
            episode_return[ended], episode_length[ended] = self._return[ended], self._length[ended]
            self._return[ended], self._length[ended] = 0.0, 0
            if self._same_step:
                reached = self._reached(seen, info, before, ended, truncated)
            else:
                seen = self._reset_rows(seen, ended)
        self._latest = seen
        obs_shown = self._observation(seen.groups)
        return StepResult(
            obs=obs_shown,
            reward=self._tensor(reward.astype(np.float32)),
            terminated=self._tensor(terminated),
            truncated=self._tensor(truncated),
            reached_obs=obs_shown if reached is seen.groups else self._observation(reached),
            action_mask=self._mask(seen),
            episode_return=self._tensor(episode_return),
            episode_length=self._tensor(episode_length),
        )

    def begin_iteration(self, progress: RunProgress) -> None:
        """Pass the progress of the run to the environments that have ``begin_iteration``."""
        pass_progress(self._env, progress)

    @property
    def frames_per_s(self) -> float:
        """Pictures of ``render`` for a second of the simulated time."""
        single: Any = next(iter(getattr(self._env, "envs", ())), self._env)
        return float(dict(getattr(single, "metadata", None) or {}).get("render_fps") or 30.0)

    def render(self) -> UInt8[Tensor, "B H W 3"]:
        """Pictures of all environments.

        Raises:
            ValueError: If the simulator draws none.
        """
        render = getattr(self._env, "render", None)
        require(callable(render), f"{self._name}.render", "return pictures", "no such method")
        assert render is not None
        pictures = np.asarray(render())
        form = f"{pictures.dtype} {list(pictures.shape)}"
        ok = pictures.dtype == np.uint8 and pictures.ndim == 4 and pictures.shape[-1] == 3
        require(ok, f"{self._name}.render", "return pictures as uint8 [B, H, W, 3]", form)
        return torch.from_numpy(pictures)

    def close(self) -> None:
        """Release the simulator's processes, windows and memory."""
        self._env.close()

    # Episodes.

    def _restart_books(self) -> None:
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, np.int64)

    def _reset_rows(self, seen: _Seen, ended: Array) -> _Seen:
        """Reset the environments whose episode ended; the others are as they were seen.

        Some simulators return the environments that were reset and no others, and the values of
        others may not even lie in their space: only what was reset is encoded.
        """
        if self._resets_next:
            obs, *_, info = self._env.step(self._idle)  # which acts on nothing
        else:
            obs, info = self._env.reset(options={"reset_mask": ended.copy()})  # some pop the option
        rows = np.flatnonzero(ended)
        if len(next(iter(obs.values())) if isinstance(obs, dict) else obs) != self.num_envs:
            rows = np.asarray(info.get("env_id", rows))
        elif isinstance(obs, dict):
            obs = {name: _rows_of(value)[rows] for name, value in obs.items()}
        else:
            obs = _rows_of(obs)[rows]
        groups = {name: value.copy() for name, value in seen.groups.items()}
        for name, value in self._encode(obs).items():
            groups[name][rows] = value
        mask = None if seen.mask is None else seen.mask.copy()
        if mask is not None:
            mask[rows] = self._read_mask(obs, info, rows)
        return _Seen(groups, mask)

    def _reached(
        self, seen: _Seen, info: Mapping[str, Any], before: _Seen, ended: Array, truncated: Array
    ) -> Groups:
        """Observations reached in a step by all environments of a simulator that resets itself."""
        final = next((info[name] for name in _FINAL if info.get(name) is not None), None)
        rows = np.flatnonzero(ended)
        reached = {name: value.copy() for name, value in seen.groups.items()}
        if final is None:
            known = self._lost == "previous" or not truncated.any()
            hint = "Or set lost='previous', which takes the observation acted on."
            rule = "return final_obs in info where it truncates"
            require(known, self._name, rule, None, hint)
            for name, value in reached.items():
                value[rows] = before.groups[name][rows]
            return reached
        for name, encode in self._encoders.items():
            values = [_row_of(final, name, row) for row in rows.tolist()]
            reached[name][rows] = encode(np.stack(values))
        return reached

    # Between arrays and tensors.

    def _encode(self, obs: Any) -> Groups:
        """An observation as numbers, in new arrays by group."""
        if not isinstance(obs, dict):
            return {name: encode(obs) for name, encode in self._encoders.items()}
        return {name: encode(obs[name]) for name, encode in self._encoders.items()}

    def _see(self, obs: Any, info: Mapping[str, Any]) -> _Seen:
        """Observation and mask after a step or reset of all environments."""
        mask = None
        if self.spaces.masked:
            mask = self._read_mask(obs, info, np.arange(self.num_envs))
        return _Seen(self._encode(obs), mask)

    def _read_mask(self, obs: Any, info: Mapping[str, Any], rows: Array) -> Array:
        """Masks of the environments ``rows``, to which ``obs`` belongs; ``info`` is of all."""
        size = mask_size(self.spaces.action)
        rule = f"have action masks of {size} entries"
        if self._mask_entry is None:
            allowed = np.array(_rows_of(obs[MASK]), bool).reshape(len(rows), -1)
            require(allowed.shape[1] == size, self._name, rule, list(allowed.shape[1:]))
            return allowed
        allowed = np.ones((len(rows), size), bool)  # without a mask, every action is allowed
        values = info.get(self._mask_entry)
        if values is None:
            return allowed
        has = np.asarray(info.get("_" + self._mask_entry, np.ones(self.num_envs)), bool)
        for place, row in enumerate(rows.tolist()):
            if has[row] and values[row] is not None:
                mask = np.ravel(values[row]).astype(bool)
                require(len(mask) == size, self._name, rule, list(mask.shape))
                allowed[place] = mask
        return allowed

    def _observation(self, groups: Groups) -> Observation:
        tensors = {name: self._tensor(value) for name, value in groups.items()}
        return tensors if self._grouped else next(iter(tensors.values()))

    def _mask(self, seen: _Seen) -> Tensor | None:
        return None if seen.mask is None else self._tensor(seen.mask)

    def _tensor(self, value: Array) -> Tensor:
        tensor = torch.from_numpy(value)  # pyright: ignore[reportUnknownMemberType]
        return tensor if self._device.type == "cpu" else tensor.to(self._device)


def require_mask_entry(entry: str, info: Mapping[str, Any]) -> None:
    """Refuse an entry of ``info`` for action masks that is absent after a reset.

    Raises:
        ValueError: If the entry is absent; the error names those that are there.
    """
    there = sorted(name for name in info if not name.startswith("_"))
    rule = "name an entry of info that resets return"
    hint = f"There {'is ' + ', '.join(there) if there else 'are no entries'}."
    require(entry in info, "Gymnasium.mask", rule, entry, hint)


def _rows_of(value: Any) -> Any:
    return np.stack(value) if isinstance(value, tuple | list) else value


def _row_of(final: Any, name: str, row: int) -> Any:
    """The last observation of one environment; that of one group where there are groups."""
    if isinstance(final, dict):
        return np.asarray(final[name])[row]
    value = final[row]
    return value[name] if isinstance(value, dict) else value
