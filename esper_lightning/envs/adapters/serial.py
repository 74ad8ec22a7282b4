"""Environments of Gymnasium that are stepped one after another. Axes: ``B`` environment.

Gymnasium has ``SyncVectorEnv`` for this, which checks spaces, copies observations and merges every
entry of ``info`` in each step. Nobody reads these here, and in small environments they cost much of
the time: ``benchmarks/adapters.py``.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from esper_lightning.core.errors import Words, require
from esper_lightning.envs.base import closed_after_error

__all__ = ["SerialEnv"]


class SerialEnv:
    """A vector environment that steps single environments, and resets them on request.

    The class implements what ``HostEnv`` calls of Gymnasium's vector API.

    Args:
        makers: Functions that make the single environments.
        entry: Entry of ``info`` that is returned; ``None`` for none.
        name: Name of the task in errors.

    Attributes:
        num_envs: Number of environments, ``B``.
        envs: The single environments.
        closed: Whether ``close`` was called.

    Raises:
        ValueError: If an environment returns what does not fit; ``reset`` and ``step`` raise it.
    """

    def __init__(
        self, makers: Sequence[Callable[[], Any]], *, entry: str | None, name: str
    ) -> None:
        self._name = name
        self.envs: list[Any] = []
        self.closed = False
        with closed_after_error(self):
            self.envs += (make() for make in makers)
        self.num_envs, self._entry = len(self.envs), entry
        self.metadata = {"autoreset_mode": "Disabled"}
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self._obs = _buffers(self.single_observation_space, self.num_envs)
        self._reward = np.zeros(self.num_envs)
        self._terminated, self._truncated = np.zeros((2, self.num_envs), bool)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start new episodes, everywhere or where ``options["reset_mask"]`` is true."""
        rows = range(self.num_envs)
        if options is not None:
            rows = np.flatnonzero(options["reset_mask"]).tolist()
        infos: list[Mapping[str, Any]] = [{}] * self.num_envs
        for row in rows:
            result = self.envs[row].reset(seed=None if seed is None else seed + row)
            try:
                obs, infos[row] = result
                fits = self._keep(row, obs)
            except (TypeError, ValueError, KeyError) as error:
                raise self._misfit("reset", "an observation and info", error) from error
            if options is None or not fits:
                self._require_fit("reset", obs, self.single_observation_space)
        return self._obs, self._info(infos)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Act in every environment; the arrays that are returned are reused by the next call."""
        infos: list[Mapping[str, Any]] = [{}] * self.num_envs
        for row, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            result = env.step(action)
            try:
                obs, reward, terminated, truncated, infos[row] = result
                self._reward[row] = reward
                self._terminated[row], self._truncated[row] = terminated, truncated
                fits = self._keep(row, obs)
                if not isinstance(infos[row], Mapping):
                    raise TypeError(f"info is of type {type(infos[row]).__name__}")
            except (TypeError, ValueError, KeyError) as error:
                what = "an observation, a number as reward, terminated, truncated and info"
                raise self._misfit("step", what, error) from error
            if not fits:
                self._require_fit("step", obs, self.single_observation_space)
        flags = self._terminated, self._truncated
        return self._obs, self._reward, *flags, self._info(infos)

    def render(self) -> Any:
        """Pictures ``[B, H, W, 3]`` of all environments.

        Raises:
            ValueError: If an environment draws none.
        """
        pictures = [env.render() for env in self.envs]
        rule, hint = "draw pictures", "Its render_mode must be 'rgb_array'."
        got = [type(picture).__name__ for picture in pictures]
        ok = all(isinstance(picture, np.ndarray) for picture in pictures)
        require(ok, "render() of an environment", rule, got[0], hint)
        return np.stack(pictures)

    def close(self) -> None:
        """Close every environment."""
        self.closed = True
        for env in self.envs:
            env.close()

    def _keep(self, row: int, obs: Any) -> bool:
        """Copy an observation; ``False`` if NumPy had to stretch it."""
        if not isinstance(self._obs, dict):
            self._obs[row] = obs
            return np.size(obs) * self.num_envs == self._obs.size
        for name, buffer in self._obs.items():
            buffer[row] = obs[name]
        return all(np.size(obs[k]) * self.num_envs == each.size for k, each in self._obs.items())

    def _misfit(self, method: str, what: str, error: Exception) -> ValueError:
        why = f"{type(error).__name__}: {error}"
        return ValueError(f"{self._name}.{method}() must return {what}, got another result. {why}")

    def _require_fit(self, method: str, obs: Any, space: Any, group: str = "") -> None:
        """Refuse an observation that NumPy would stretch or round to fit its space.

        Raises:
            ValueError: If shape or kind of number are others than those of the space.
        """
        if type(space).__name__ == "Dict":
            for name, each in space.spaces.items():
                self._require_fit(method, obs[name], each, f"[{name!r}]")
            return
        value = np.asarray(obs)
        rule = f"be {space.dtype} {list(space.shape)} as its observation_space says"
        rounded = value.dtype.kind == "f" and np.issubdtype(space.dtype, np.integer)
        ok = value.size == math.prod(space.shape) and not rounded
        got = Words(f"{value.dtype} {list(value.shape)}")
        require(ok, f"{self._name}.{method}()'s observation{group}", rule, got)

    def _info(self, infos: list[Mapping[str, Any]]) -> dict[str, Any]:
        """``info`` with one entry: an array of objects, with a flag for each row that has one.

        Where no row has the entry, the names of the entries that are there are returned, for the
        error.
        """
        if self._entry is None:
            return {}
        entries = [info.get(self._entry) for info in infos]
        has = np.array([entry is not None for entry in entries])
        if not has.any():
            return {name: None for info in infos for name in info if name != self._entry}
        values = np.full(self.num_envs, None, object)
        for row, entry in enumerate(entries):
            values[row] = entry
        return {self._entry: values, f"_{self._entry}": has}


def _buffers(space: Any, num_envs: int) -> Any:
    """Arrays for the observations of all environments, by group where the space has groups."""
    if type(space).__name__ == "Dict":
        groups: Mapping[str, Any] = space.spaces
        return {name: _buffers(each, num_envs) for name, each in groups.items()}
    return np.zeros((num_envs, *space.shape), space.dtype)
