"""What an environment shows and takes.

Data without tensors, so that a policy can be built before any device is chosen.
"""

import math
from dataclasses import dataclass

from esper_lightning.core.validate import require

__all__ = ["ActionSpace", "Box", "Discrete", "EnvSpaces", "MultiDiscrete", "ObsSpace", "mask_size"]


@dataclass(frozen=True)
class Box:
    """Real vectors (or arrays) within bounds, each component alike.

    Attributes:
        shape: Without the environment axis; ``(4,)`` for four features.
        low: Least value of every component; may be ``-inf``, or a tuple with one bound per
            component.
        high: Greatest value of every component; may be ``inf``, or a tuple likewise.
    """

    shape: tuple[int, ...]
    low: float | tuple[float, ...] = -math.inf
    high: float | tuple[float, ...] = math.inf

    def __post_init__(self) -> None:
        size = math.prod(self.shape)
        require(size > 0, "Box.shape", "have at least one component", self.shape)
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
        require(self.n >= 1, "Discrete.n", "be at least 1", self.n)


@dataclass(frozen=True)
class MultiDiscrete:
    """Several choices at once: an int64 tensor ``[B, A]``, component ``a`` in ``[0, nvec[a])``."""

    nvec: tuple[int, ...]

    def __post_init__(self) -> None:
        ok = len(self.nvec) > 0 and all(n >= 1 for n in self.nvec)
        require(ok, "MultiDiscrete.nvec", "be a non-empty tuple of sizes of at least 1", self.nvec)


ObsSpace = Box | dict[str, Box]
ActionSpace = Discrete | MultiDiscrete | Box


@dataclass(frozen=True, kw_only=True)
class EnvSpaces:
    """Spaces of one environment, without the environment axis.

    Attributes:
        obs: A box, or a box for each named group.
        action: What ``step`` takes.
        masked: Whether every observation comes with an action mask.
    """

    obs: ObsSpace
    action: ActionSpace
    masked: bool = False

    def __post_init__(self) -> None:
        ok = not (self.masked and isinstance(self.action, Box))
        require(ok, "EnvSpaces.masked", "be False for a continuous action space", self.masked)
        if isinstance(self.obs, dict):
            named = len(self.obs) > 0 and all(name.isidentifier() for name in self.obs)
            rule = "have groups, named like Python identifiers"
            require(named, "EnvSpaces.obs", rule, list(self.obs))


def mask_size(space: ActionSpace) -> int:
    """``K``: length of an action mask, the choices of all components one after another.

    Raises:
        ValueError: If the space is continuous.
    """
    if isinstance(space, Discrete):
        return space.n
    require(isinstance(space, MultiDiscrete), "mask_size", "be asked of a discrete space", space)
    assert isinstance(space, MultiDiscrete)
    return sum(space.nvec)
