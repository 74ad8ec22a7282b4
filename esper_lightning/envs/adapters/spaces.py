"""Conversion of Gymnasium's spaces to those of this package, and of values between the two.

Axes: ``B`` environment. Spaces are recognised by the names of their classes, so that Gymnasium need
not be installed.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_lightning.core.errors import require
from esper_lightning.core.spaces import (
    ActionSpace,
    Box,
    Discrete,
    EnvSpaces,
    MultiDiscrete,
    ObsSpace,
)

__all__ = [
    "MASK",
    "ONE_HOT",
    "action_box",
    "action_encoder",
    "action_range",
    "group_spaces",
    "idle_action",
    "obs_encoder",
    "read_action_space",
    "read_spaces",
    "some_action",
]

MASK = "action_mask"
"""The entry of a ``Dict`` observation that says which actions are allowed."""

Array = npt.NDArray[Any]
ONE_HOT = (-0.5, 1.5)
"""Bounds of a column that is 0 or 1."""


def read_spaces(
    obs: Any, action: Any, *, masked: bool = False, keeps_bounds: bool = True
) -> EnvSpaces:
    """The spaces of one environment, converted from Gymnasium's.

    Args:
        obs: Gymnasium's observation space of one environment.
        action: Gymnasium's action space of one environment.
        masked: Whether there are action masks although the observation has no entry for them.
        keeps_bounds: Whether observations lie within the bounds of their space. Otherwise only
            images have bounds.

    Raises:
        ValueError: If a space has no counterpart; the error names the space and a wrapper that
            helps.
    """
    boxes = {name: _obs_box(name, space) for name, space in group_spaces(obs).items()}
    if not keeps_bounds:
        boxes = {n: box if box.dtype == "uint8" else Box(box.shape) for n, box in boxes.items()}
    masked = masked or (_kind(obs) == "Dict" and MASK in obs.spaces)
    found: ObsSpace = boxes if len(boxes) > 1 else next(iter(boxes.values()))
    return EnvSpaces(obs=found, action=read_action_space(action), masked=masked)


def group_spaces(obs: Any) -> dict[str, Any]:
    """The spaces of the groups of an observation; one group, ``obs``, where it has none.

    Raises:
        ValueError: If the name of a group is no Python identifier, or there is no group.
    """
    if _kind(obs) != "Dict":
        return {"obs": obs}
    groups = {str(name): space for name, space in obs.spaces.items() if name != MASK}
    named = len(groups) > 0 and all(name.isidentifier() for name in groups)
    rule = "have groups, named like Python identifiers"
    require(named, "observation_space", rule, list(groups))
    return groups


def obs_encoder(space: Any) -> Callable[[Any], Array]:
    """A function that converts a batch of one group to numbers, in a new array.

    Images of ``uint8`` keep their dtype, and all other values become ``float32``. Values of
    ``Discrete`` and ``MultiDiscrete`` spaces become one-hot columns.
    """
    kind = _kind(space)
    if kind == "Discrete":
        eye, start = np.eye(int(space.n), dtype=np.float32), int(space.start)
        return lambda value: eye[np.asarray(value) - start]
    if kind == "MultiDiscrete":
        starts = np.ravel(space.start)
        eyes = [np.eye(int(n), dtype=np.float32) for n in np.ravel(space.nvec)]

        def columns(value: Any) -> Array:
            choices = np.asarray(value).reshape(len(value), -1) - starts
            return np.concatenate([eye[choices[:, i]] for i, eye in enumerate(eyes)], 1)

        return columns
    dtype = np.uint8 if _is_image(space) else np.float32
    if len(space.shape) == 0:  # one number, which becomes a vector
        return lambda value: np.array(value, dtype).reshape(-1, 1)
    return lambda value: np.array(value, dtype)


def action_encoder(space: Any) -> Callable[[Array], Array]:
    """A function that converts a batch of actions to a simulator's type, range and shape.

    Actions of a box of integers are rounded to the nearest one within the bounds.
    """
    start = np.asarray(getattr(space, "start", 0)) if _kind(space) != "Box" else np.asarray(0)
    shape, dtype = tuple(space.shape), space.dtype
    if (found := action_range(space)) is not None:
        low, high = found
        scaled = np.isfinite(low) & np.isfinite(high)
        least, span = (
            np.where(scaled, low, 0.0),
            np.subtract(high, low, where=scaled, out=np.zeros_like(low)),
        )

        def to_bounds(action: Array) -> Array:
            action = action.reshape(-1, *shape).astype(float)
            within = least + (action.clip(-1.0, 1.0) + 1.0) / 2.0 * span
            return _to_dtype(np.where(scaled, within, action.clip(low, high)), space)

        return to_bounds
    if _kind(space) == "Box":
        return lambda action: _to_dtype(action.reshape(-1, *shape), space)
    return lambda action: (action.reshape(-1, *shape) + start).astype(dtype)


def _to_dtype(action: Array, space: Any) -> Array:
    if np.issubdtype(space.dtype, np.integer):
        action = np.rint(action).clip(space.low, space.high)
    return action.astype(space.dtype)


def action_range(space: Any) -> tuple[Array, Array] | None:
    """Least and greatest values of actions that an adapter must keep to itself.

    The adapter scales components with two finite bounds from [-1, 1], and clips the others to the
    bound that they have, if any. ``None`` where ``read_action_space`` returns the bounds, so that
    policies scale, or where there are none.
    """
    if getattr(space, "low", None) is None:  # no box
        return None
    low, high = np.asarray(space.low, float), np.asarray(space.high, float)
    if np.isneginf(low).all() and np.isposinf(high).all():
        return None
    alike = (low == low.flat[0]).all() and (high == high.flat[0]).all()
    ours = (low < high).all() and (alike or len(space.shape) < 2)
    return None if ours and np.isfinite([low, high]).all() else (low, high)


def idle_action(space: Any, num_envs: int) -> Array:
    """Any allowed action for each of ``num_envs`` environments."""
    if _kind(space) == "Box":
        low, high = np.nan_to_num(np.asarray(space.low)), np.nan_to_num(np.asarray(space.high))
        one = np.clip(np.zeros(space.shape), low, high)
    else:
        one = np.zeros(space.shape) + np.asarray(getattr(space, "start", 0))
    return np.broadcast_to(one, (num_envs, *space.shape)).astype(space.dtype)


def some_action(space: Any, num_envs: int, generator: np.random.Generator) -> Array:
    """Random actions of ``num_envs`` environments; every action must be allowed."""
    shape = (num_envs, *space.shape)
    if _kind(space) == "Box":
        low, high = np.asarray(space.low, float), np.asarray(space.high, float)
        low, high = np.maximum(low, np.minimum(-1, high)), np.minimum(high, np.maximum(1, low))
        return (low + generator.random(shape) * (high - low)).astype(space.dtype)
    choices = getattr(space, "n", 2) if _kind(space) == "Discrete" else getattr(space, "nvec", 2)
    start = np.asarray(getattr(space, "start", 0))
    return (generator.integers(choices, size=shape) + start).astype(space.dtype)


def _kind(space: Any) -> str:
    return type(space).__name__


def _is_image(space: Any) -> bool:
    return _kind(space) == "Box" and space.dtype == np.uint8


def _obs_box(name: str, space: Any) -> Box:
    field = "observation_space" if name == "obs" else f"observation_space[{name!r}]"
    kind = _kind(space)
    if kind == "Box":
        return _box(space)
    hint = "Wrap it: gymnasium.wrappers.FlattenObservation or FilterObservation."
    rule = "be Box, Discrete, MultiDiscrete, MultiBinary or a Dict of these"
    sizes: Mapping[str, Callable[[], tuple[int, ...]]] = {
        "Discrete": lambda: (int(space.n),),
        "MultiDiscrete": lambda: (int(np.sum(space.nvec)),),
        "MultiBinary": lambda: tuple(int(n) for n in np.atleast_1d(space.shape)),
    }
    require(kind in sizes, field, rule, space, hint)
    return Box(sizes[kind](), *ONE_HOT)


def read_action_space(space: Any) -> ActionSpace:
    """The action space of one environment, converted from Gymnasium's.

    Raises:
        ValueError: If the space has no counterpart.
    """
    kind = _kind(space)
    rule = "be Box, Discrete, MultiDiscrete or MultiBinary"
    hint = "Wrap it so that it takes one array."
    known = kind in ("Box", "Discrete", "MultiDiscrete", "MultiBinary")
    require(known, "action_space", rule, space, hint)
    if kind == "Box":
        return action_box(space)
    if kind == "Discrete":
        return Discrete(int(space.n))
    if kind == "MultiDiscrete":
        return MultiDiscrete(tuple(int(n) for n in np.ravel(space.nvec)))
    return MultiDiscrete((2,) * int(np.prod(space.shape)))


def action_box(space: Any) -> Box:
    """The action space of a box: its own bounds, or others where ``action_range`` has bounds.

    ``Box`` can represent neither a constant component nor other bounds for each component of a
    matrix, and policies scale all components or none. The space is then [-1, 1] if all components
    have two bounds, and otherwise has no bounds.
    """
    shape = tuple(int(n) for n in space.shape) or (1,)
    if (found := action_range(space)) is not None:
        return Box(shape, -1.0, 1.0) if np.isfinite(found).all() else Box(shape)
    return _bounded(space, shape) if getattr(space, "low", None) is not None else Box(shape)


def _box(space: Any) -> Box:
    """A box with Gymnasium's bounds if ``Box`` can represent them, else without bounds."""
    shape = tuple(int(n) for n in space.shape) or (1,)
    if _is_image(space):
        return Box(shape, 0.0, 255.0, dtype="uint8")
    return _bounded(space, shape)


def _bounded(space: Any, shape: tuple[int, ...]) -> Box:
    low, high = np.asarray(space.low, float), np.asarray(space.high, float)
    if low.size == 0 or not (low < high).all():  # refused by Box, or a column that is constant
        return Box(shape)
    if (low == low.flat[0]).all() and (high == high.flat[0]).all():
        return Box(shape, float(low.flat[0]), float(high.flat[0]))
    if len(shape) > 1:
        return Box(shape)
    return Box(shape, tuple(low.ravel().tolist()), tuple(high.ravel().tolist()))
