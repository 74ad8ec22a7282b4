"""Codes, which say on which samples an element depends.

A code is ``ZERO``, ``FIXED`` (the same whatever the samples are), ``EVEN`` (fixed, and the same at
all places of a tensor whose size grows with the number of samples), ``TOTAL`` (a sum over all
samples) or ``FIRST + m`` (depends on sample ``m`` and on what is fixed).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

__all__ = [
    "EVEN",
    "FIRST",
    "FIXED",
    "TOTAL",
    "ZERO",
    "Call",
    "MixedError",
    "alike",
    "alone",
    "chosen",
    "code_of",
    "has_code",
    "largest",
    "operation_name",
    "refuse_uneven",
    "require_that",
    "rows_of",
    "together",
]

ZERO, FIXED, EVEN, TOTAL, FIRST = range(5)


class MixedError(Exception):
    """Raised for an operation that combines samples, or may do so; the message says how."""


class Call(NamedTuple):
    """A call of an operation, with codes in the place of tensors.

    Attributes:
        node: The call.
        other: The same call for more samples.
        args: Arguments.
        kwargs: Further arguments.
    """

    node: fx.Node
    other: fx.Node
    args: Sequence[Any]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the operation without its overload, such as ``add``."""
        return operation_name(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(self.node.meta["val"].shape)

    @property
    def larger(self) -> tuple[int, ...]:
        """Shape of the result for more samples."""
        return tuple(self.other.meta["val"].shape)

    @property
    def grown_axes_of_first(self) -> set[int]:
        """Axes of the first argument whose extent depends on the number of samples."""
        given: Any = (self.node.args[0], self.other.args[0])
        shape, larger = (one.meta["val"].shape for one in given)
        return {axis for axis, extent in enumerate(shape) if extent != larger[axis]}

    def results(self, code: Tensor) -> Any:
        """A code expanded to the shape of the result, or of each result."""
        value: Any = self.node.meta["val"]
        if isinstance(value, Tensor):
            return code.expand(value.shape)
        return [code.expand(one.shape) for one in value]


def operation_name(node: fx.Node) -> str:
    """Name of an operation without its overload, such as ``add``."""
    name = str(node.target).removeprefix("aten.").removeprefix("esper_lightning.")
    return name.split(".", maxsplit=1)[0]


def require_that(holds: bool, what: str) -> None:
    """Raise ``MixedError`` unless a condition holds."""
    if not holds:
        raise MixedError(what)


def largest(code: Tensor) -> int:
    """The largest of some codes."""
    return int(code.max())


def together(values: Sequence[Tensor]) -> Tensor:
    """The codes of elements that depend on one element of each argument."""
    both = values[0]
    for value in values[1:]:
        clash = (both >= TOTAL) & (value >= TOTAL) & (both != value)
        require_that(not bool(clash.any()), "of different samples")
        both = torch.maximum(both, value)
    return both


def rows_of(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The elements of each reduction, one reduction a row."""
    kept = [axis for axis in range(x.dim()) if axis not in axes]
    number = 1
    for axis in kept:
        number *= x.shape[axis]
    return x.permute([*kept, *axes]).reshape(number, -1)


def alone(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The one sample of all elements along axes, which are 1 in the result."""
    kept = [1 if axis in axes else extent for axis, extent in enumerate(x.shape)]
    rows = rows_of(x, axes)
    high = rows.amax(1)
    low = rows.masked_fill(rows < TOTAL, int(x.max())).amin(1)
    require_that(TOTAL not in rows, "of a sum")
    require_that(EVEN not in rows, "of the number of samples")
    require_that(not bool(((high >= FIRST) & (low != high)).any()), "of different samples")
    return high.reshape(kept)


def alike(x: Tensor, axis: int) -> Tensor:
    """Codes that are the same along an axis, which is 1 in the result."""
    high = x.amax(axis, keepdim=True)
    require_that(not bool(((high >= TOTAL) & (x != high)).any()), "at places that are computed")
    return high


def has_code(value: Any) -> bool:
    """Whether an argument is a tensor or a number."""
    return isinstance(value, Tensor | bool | int | float)


def code_of(value: Any) -> Tensor:
    """The codes of an argument that is a tensor or a number."""
    return value if isinstance(value, Tensor) else torch.tensor(FIXED if value else ZERO)


def refuse_uneven(values: Sequence[Tensor]) -> None:
    """Refuse what is even beside what is fixed and differs from place to place."""
    if any(EVEN in value for value in values):
        uneven = any(value.numel() > 1 and FIXED in value for value in values)
        require_that(not uneven, "of the number of samples")


def chosen(x: Tensor, index: Tensor) -> Tensor:
    """The codes of elements at indices that are computed."""
    require_that(TOTAL not in index and EVEN not in index, "of a sum")
    return together([x, index])
