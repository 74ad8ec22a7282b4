"""What simulators return as tensors of torch, in our terms. Axis: ``B`` environment."""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_lightning.core.errors import Words, require
from esper_lightning.core.spaces import Box, ObsSpace
from esper_lightning.core.types import Observation
from esper_lightning.envs.adapters.spaces import MASK, action_range

__all__ = [
    "FreshLog",
    "read_boxes",
    "read_count",
    "read_device",
    "read_extras",
    "require_results",
    "require_tensors",
    "takes_seed",
    "to_groups",
    "to_range",
]


class FreshLog:
    """Each log of a simulator once: Isaac Lab returns the last log again until the next reset."""

    def __init__(self) -> None:
        self._last: object = None

    def of(self, extras: Mapping[str, Any], *, field: str) -> Mapping[str, Any]:
        """The log in ``extras`` if it is not the log of the last call; otherwise an empty log.

        Args:
            extras: What the simulator returned besides.
            field: Name of the method that returned it, for the error.

        Raises:
            ValueError: If the log is no dict.
        """
        for name in ("log", "episode"):
            log = extras.get(name)
            if log is not None:
                got = Words(f"a {type(log).__name__}")
                require(hasattr(log, "items"), field, f"return extras[{name!r}] as a dict", got)
                if len(log):
                    fresh, self._last = log is not self._last, log
                    return log if fresh else {}
        return {}


def read_count(env: Any, member: str, *, name: str) -> int:
    """A number of environments or of action components that a simulator has as an attribute.

    Args:
        env: The simulator.
        member: Name of the attribute.
        name: Name of the task in the error.

    Raises:
        ValueError: If the attribute is no integer of at least 1.
    """
    value = getattr(env, member)
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    is_count = number >= 1 and not isinstance(value, bool)
    require(is_count, f"{name}.{member}", "be an integer of at least 1", value)
    return number


def read_device(env: Any, *, name: str) -> torch.device:
    """The device of a simulator, with its number.

    Args:
        env: The simulator.
        name: Name of the task in the error.

    Raises:
        ValueError: If the attribute ``device`` is no device of this machine.
    """
    try:
        return torch.empty(0, device=env.device).device
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        lines = str(error).splitlines() or [""]
        raise ValueError(
            f"{name}.device must be a device of this machine, got {env.device!r}: {lines[0]}."
        ) from error


def require_results(results: Any, counts: tuple[int, ...], *, field: str, rule: str) -> Any:
    """The results of a simulator, which must be a tuple.

    Args:
        results: What the simulator returned.
        counts: Lengths that the tuple may have.
        field: Name of the method in the error.
        rule: What the method must return.

    Raises:
        ValueError: If it is no tuple of such a length.
    """
    is_tuple = isinstance(results, tuple | list)
    got = f"{len(results)} results" if is_tuple else f"a {type(results).__name__}"
    require(is_tuple and len(results) in counts, field, rule, Words(got))
    return results


def require_tensors(*values: Any, num_envs: int, field: str) -> None:
    """Refuse rewards and flags that are no tensors of one number for each environment.

    Args:
        *values: Rewards and flags.
        num_envs: Number of environments.
        field: Name of the method that returned them, for the error.

    Raises:
        ValueError: If one is none; the error names its type or shape.
    """
    for value in values:
        rule, hint = "return rewards and flags as tensors", "torch.as_tensor makes one."
        got = Words(f"a {type(value).__name__}")
        require(isinstance(value, Tensor), field, rule, got, hint)
        rule = f"return rewards and flags of shape [B] = [{num_envs}]"
        require(value.shape == (num_envs,), field, rule, list(value.shape))


def read_extras(extras: Any, *, field: str) -> Mapping[str, Any]:
    """What a simulator returned besides, as a mapping; ``None`` is an empty one.

    Raises:
        ValueError: If it is neither.
    """
    extras = {} if extras is None else extras
    got = Words(f"a {type(extras).__name__}")
    require(hasattr(extras, "get"), field, "return extras as a dict", got)
    return extras


def takes_seed(reset: Callable[..., Any]) -> bool:
    """Whether the ``reset`` of a simulator has an argument ``seed``."""
    try:
        inspect.signature(reset).bind(seed=0)
    except (TypeError, ValueError):
        return False
    return True


def to_groups(obs: Any, *, field: str) -> Observation:
    """An observation as a tensor, or as a dict of tensors where it is a dict or TensorDict.

    Args:
        obs: Observation of a simulator.
        field: Name of the method that returned it, for the error.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(obs, Tensor):
        return obs
    rule, hint = (
        "return observations as a tensor or as a dict of tensors",
        "torch.as_tensor makes one.",
    )
    ok = hasattr(obs, "keys") and all(isinstance(obs[name], Tensor) for name in obs.keys())  # noqa: SIM118
    require(ok, field, rule, Words(f"a {type(obs).__name__}"), hint)
    return {str(name): obs[name] for name in obs.keys()}  # noqa: SIM118 - a TensorDict iterates over rows


def to_range(space: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that brings actions within bounds that policies do not know (``action_range``).

    Actions of a box of integers are rounded to the nearest one within the bounds, as floats.

    Args:
        space: Gymnasium's action space of one environment.
        device: Device of the actions.
    """
    if hasattr(space, "low") and np.issubdtype(space.dtype, np.integer):
        least, most = (torch.as_tensor(each, device=device) for each in (space.low, space.high))
        scale = _to_bounds(space, device)
        return lambda action: scale(action).round().clamp(least.float(), most.float())
    return _to_bounds(space, device)


def _to_bounds(space: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
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
