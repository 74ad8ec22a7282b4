"""Spaces of observations and actions of an environment.

Spaces are data without tensors, so that a policy can be built before any device is chosen.
"""

import math
from dataclasses import dataclass
from typing import Literal

from esper_lightning.core.errors import at_least, check_fields, require

__all__ = [
    "ActionSpace",
    "Box",
    "ChannelOrder",
    "Discrete",
    "EnvSpaces",
    "FactoredDiscrete",
    "Head",
    "MultiDiscrete",
    "ObsSpace",
    "channel_axis",
    "mask_parts",
    "mask_size",
]

_MOST = 2**24  # components of an observation, choices of an action


ChannelOrder = Literal["auto", "first", "last"]
"""Place of the channels in the shape of an image."""


@dataclass(frozen=True)
class Box:
    """Real vectors (or arrays) within bounds.

    Attributes:
        shape: Shape without the environment axis; ``(4,)`` for four features.
        low: Least value of every component; may be ``-inf``, or a tuple with one bound per
            component.
        high: Greatest value of every component; may be ``inf``, or a tuple with one bound per
            component.
        dtype: Data type in which rollouts store the values. ``uint8`` is for images, which then
            take a quarter of the memory.
    """

    shape: tuple[int, ...]
    low: float | tuple[float, ...] = -math.inf
    high: float | tuple[float, ...] = math.inf
    dtype: Literal["float32", "uint8"] = "float32"

    def __post_init__(self) -> None:
        bound_rule = "be a number, or a tuple with one for each component of a flat shape"
        check_fields(self, {"low": bound_rule, "high": bound_rule})
        size = math.prod(self.shape)
        ok = size > 0 and min(self.shape, default=1) > 0
        require(ok, "Box.shape", "have at least one component", self.shape)
        require(size <= _MOST, "Box.shape", f"have at most {_MOST} components", self.shape)
        for name, bound in (("low", self.low), ("high", self.high)):
            ok = not isinstance(bound, tuple) or (len(self.shape) == 1 and len(bound) == size)
            require(ok, f"Box.{name}", f"be a number or a tuple of {size} for a flat shape", bound)
        ok = all(low < high for low, high in zip(self.lows, self.highs, strict=True))
        require(ok, "Box.low", f"be less than Box.high={self.high}", self.low)

    @property
    def size(self) -> int:
        """Number of components."""
        return math.prod(self.shape)

    @property
    def lows(self) -> tuple[float, ...]:
        """Least value of each component, flattened."""
        return self.low if isinstance(self.low, tuple) else (self.low,) * self.size

    @property
    def highs(self) -> tuple[float, ...]:
        """Greatest value of each component, flattened."""
        return self.high if isinstance(self.high, tuple) else (self.high,) * self.size

    @property
    def bounded(self) -> bool:
        """Whether every component has two finite bounds."""
        return all(math.isfinite(bound) for bound in self.lows + self.highs)


@dataclass(frozen=True)
class Discrete:
    """One choice among ``n``: an int64 tensor ``[B]`` of values in ``[0, n)``."""

    n: int

    def __post_init__(self) -> None:
        check_fields(self)
        at_least("Discrete.n", self.n, 1)
        require(self.n <= _MOST, "Discrete.n", f"be at most {_MOST}", self.n)


@dataclass(frozen=True)
class MultiDiscrete:
    """Several choices at once: an int64 tensor ``[B, A]``, component ``a`` in ``[0, nvec[a])``."""

    nvec: tuple[int, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        ok = len(self.nvec) > 0 and min(self.nvec) >= 1
        require(ok, "MultiDiscrete.nvec", "be a non-empty tuple of sizes of at least 1", self.nvec)
        ok = sum(self.nvec) <= _MOST
        require(ok, "MultiDiscrete.nvec", f"have at most {_MOST} choices", self.nvec)


@dataclass(frozen=True)
class Head:
    """One of the choices of a ``FactoredDiscrete``.

    Attributes:
        name: Name of the choice.
        size: Number of values to choose from.
        used_by: Values of the first head for which this choice has a meaning; ``None`` for all.
        conditioned: Whether the allowed values depend on the value of the first head.
    """

    name: str
    size: int
    used_by: tuple[int, ...] | None = None
    conditioned: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least("Head.size", self.size, 1)
        require(self.size <= _MOST, "Head.size", f"be at most {_MOST}", self.size)


@dataclass(frozen=True)
class FactoredDiscrete:
    """Several choices at once, of which the first decides what the others mean.

    An action is an int64 tensor ``[B, A]``, component ``a`` in ``[0, heads[a].size)``. Where the
    first choice does not use a head, the environment ignores the component of that head, which
    therefore contributes no log-probability, no entropy and no gradient.

    An action mask is the masks of the heads one after another: ``size`` entries for a head, and for
    a conditioned head ``size`` entries for each value of the first choice (``mask_parts``). Each of
    these pieces, used or not, allows at least one value.
    """

    heads: tuple[Head, ...]

    def __post_init__(self) -> None:
        field = "FactoredDiscrete.heads"
        check_fields(self)
        require(len(self.heads) >= 1, field, "not be empty", self.heads)
        names = [head.name for head in self.heads]
        require(len(set(names)) == len(names), field, "have different names", names)
        first = self.heads[0]
        free = first.used_by is None and not first.conditioned
        require(free, field, "begin with one that is always used and not conditioned", first)
        for head in self.heads[1:]:
            values = range(first.size) if head.used_by is None else head.used_by
            ok = set(values) <= set(range(first.size))
            rule = f"lie in [0, {first.size})"
            require(ok, f"Head.used_by of {head.name!r}", rule, head.used_by)

    @property
    def nvec(self) -> tuple[int, ...]:
        """Size of each component."""
        return tuple(head.size for head in self.heads)

    @property
    def mask_parts(self) -> tuple[int, ...]:
        """Lengths of the pieces of a mask that must each allow a value, in order."""
        parts: list[int] = []
        for head in self.heads:
            parts += [head.size] * (self.heads[0].size if head.conditioned else 1)
        return tuple(parts)

    @property
    def mask_slices(self) -> tuple[slice, ...]:
        """Slice of each head in a mask; ``[values of the first head, size]`` if conditioned."""
        slices: list[slice] = []
        start = 0
        for head in self.heads:
            length = head.size * (self.heads[0].size if head.conditioned else 1)
            slices.append(slice(start, start + length))
            start += length
        return tuple(slices)


ObsSpace = Box | dict[str, Box]
ActionSpace = Discrete | MultiDiscrete | FactoredDiscrete | Box


@dataclass(frozen=True, kw_only=True)
class EnvSpaces:
    """Spaces of one environment, without the environment axis.

    Attributes:
        obs: Space of observations: a box, or a box for each named group.
        action: Space of the actions that ``step`` takes.
        masked: Whether every observation comes with an action mask.
    """

    obs: ObsSpace
    action: ActionSpace
    masked: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        ok = not (self.masked and isinstance(self.action, Box))
        require(ok, "EnvSpaces.masked", "be False for a continuous action space", self.masked)
        if isinstance(self.obs, dict):
            named = len(self.obs) > 0 and all(name.isidentifier() for name in self.obs)
            rule = "have groups, named like Python identifiers"
            require(named, "EnvSpaces.obs", rule, list(self.obs))


def channel_axis(shape: tuple[int, ...], order: ChannelOrder, *, owner: str) -> int:
    """The axis of the channels in the shape of an image: 0 or 2.

    Args:
        shape: Shape of the image, of three axes.
        order: Place of the channels; ``auto`` takes the first or last axis if it is shorter than
            both other axes.
        owner: Name of the spec that has the setting ``channel_order``, for the error.

    Raises:
        ValueError: If ``order`` is ``auto`` and neither axis is the shortest.
    """
    if order != "auto":
        return 0 if order == "first" else 2
    first, middle, last = shape
    shortest = [axis for axis, size in ((0, first), (2, last)) if size == min(shape)]
    known = len(shortest) == 1 and middle > min(shape)
    rule = f"be first or last for images {list(shape)}, whose channels no axis shows"
    require(known, f"{owner}.channel_order", rule, order)
    return shortest[0]


def mask_parts(space: ActionSpace) -> tuple[int, ...]:
    """Lengths of the pieces of an action mask that must each allow a value, in order.

    Raises:
        ValueError: If the space is continuous.
    """
    if isinstance(space, FactoredDiscrete):
        return space.mask_parts
    return space.nvec if isinstance(space, MultiDiscrete) else (mask_size(space),)


def mask_size(space: ActionSpace) -> int:
    """``K``: length of an action mask, the choices of all components one after another.

    Raises:
        ValueError: If the space is continuous.
    """
    if isinstance(space, Discrete):
        return space.n
    if isinstance(space, FactoredDiscrete):
        return sum(space.mask_parts)
    require(isinstance(space, MultiDiscrete), "mask_size", "be asked of a discrete space", space)
    assert isinstance(space, MultiDiscrete)
    return sum(space.nvec)
