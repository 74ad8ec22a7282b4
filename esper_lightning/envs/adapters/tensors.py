"""What simulators return as tensors of torch, in our terms. Axis: ``B`` environment."""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from esper_lightning.core.spaces import Box, ObsSpace
from esper_lightning.core.types import Observation
from esper_lightning.envs.adapters.spaces import MASK, action_range

__all__ = ["FreshLog", "read_boxes", "to_groups", "to_range"]


class FreshLog:
    """Each log of a simulator once: Isaac Lab returns the last log again until the next reset."""

    def __init__(self) -> None:
        self._last: object = None

    def of(self, extras: Mapping[str, Any]) -> Mapping[str, Any]:
        """The log in ``extras`` if it is not the log of the last call; otherwise an empty log."""
        log = extras.get("log") or extras.get("episode") or {}
        fresh, self._last = log is not self._last, log
        return log if fresh else {}


def to_groups(obs: Any) -> Observation:
    """An observation as a tensor, or as a dict of tensors where it is a dict or TensorDict."""
    if isinstance(obs, Tensor):
        return obs
    return {str(name): obs[name] for name in obs.keys()}  # noqa: SIM118 - a TensorDict iterates over rows


def to_range(space: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that brings actions within bounds that policies do not know (``action_range``).

    Args:
        space: Gymnasium's action space of one environment.
        device: Device of the actions.
    """
    found = action_range(space)
    if found is None:
        return lambda action: action
    low, high = (torch.tensor(bound, dtype=torch.float32, device=device) for bound in found)
    scaled = low.isfinite() & high.isfinite()
    least, span = low.where(scaled, 0.0), (high - low).where(scaled, 0.0)

    def to_bounds(action: Tensor) -> Tensor:
        within = least + (action.clamp(-1.0, 1.0) + 1.0) / 2.0 * span
        return torch.where(scaled, within, action.clamp(low, high))

    return to_bounds


def read_boxes(obs: Observation) -> ObsSpace:
    """The space of an observation, from the shapes and dtypes of its tensors."""
    if isinstance(obs, Tensor):
        return _box(obs)
    groups = {name: _box(value) for name, value in obs.items() if name != MASK}
    alone = len(groups) == 1 and MASK in obs
    return next(iter(groups.values())) if alone else groups


def _box(value: Tensor) -> Box:
    shape = tuple(value.shape[1:]) or (1,)
    return Box(shape, 0.0, 255.0, dtype="uint8") if value.dtype == torch.uint8 else Box(shape)
