"""What a generated function consists of: nests of loops around statements, and calls."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from esper_lightning.compiling.native.values import Buffer, Shape

__all__ = ["Call", "Load", "Nest", "Rows", "Store", "Sum", "chunk_rows"]

_ROWS = 64  # of a chunk, whose activations then stay in the caches of one core


@dataclass(frozen=True, eq=False)
class Load:
    """An element that a statement reads."""

    buffer: Buffer
    view: Tensor
    index: tuple[str, ...]


class Rows(NamedTuple):
    """Equal division of rows among the threads of a team."""

    number: int

    @property
    def granularity(self) -> int:
        """Rows that stay together, so that vector instructions see the same rows in any team."""
        return 64 if self.number >= 512 else 1

    def holds(self, load: Load) -> bool:
        """Whether a row of the loop touches only the same row of the buffer."""
        view, number = load.view, self.number
        if not load.index or load.index[0] != "i0" or view.shape[0] != number:
            return False
        row, rest = divmod(load.buffer.numel, number)
        sizes = zip(view.shape[1:], view.stride()[1:], strict=True)
        last = view.storage_offset() + sum((extent - 1) * stride for extent, stride in sizes)
        return rest == 0 and view.stride(0) == row and last < row


@dataclass
class Store:
    """A statement that computes an element, and stores it where something reads it.

    Attributes:
        text: Expression of the element.
        load: Element to write.
        variable: Variable with the element; ``None`` where several statements fill the buffer.
    """

    text: str
    load: Load
    variable: str | None


@dataclass
class Sum:
    """An accumulation over loops of a nest.

    Attributes:
        text: Expression of an element.
        load: Element that gets the result.
        dtype: Type of the result.
        start: Result where there is no element, in C.
        combine: C statement that adds the element ``{x}`` to the accumulator ``{a}``.
        clause: Operator of OpenMP's ``reduction``; empty if the order of elements matters.
        depth: Number of loops outside the accumulator.
        partial: Whether the accumulator holds a part of the result, which is added to the rest.
        in_memory: Whether the result itself is the accumulator.
        kept: Axes that are not reduced.
    """

    text: str
    load: Load
    dtype: torch.dtype
    start: str
    combine: str
    clause: str
    depth: int
    partial: bool
    in_memory: bool
    kept: tuple[int, ...]


@dataclass(eq=False)
class Nest:
    """Loops over a shape around statements.

    Attributes:
        shape: Extent of each loop.
        rows: Division of the outermost loop among threads; ``None`` where one thread does all.
        in_order: Whether the elements are computed one after another, and not as vectors.
        stores: Statements of the innermost loop.
        sums: Accumulations.
        loads: What the statements read.
    """

    shape: Shape
    rows: Rows | None
    in_order: bool
    stores: list[Store] = field(default_factory=list[Store])
    sums: list[Sum] = field(default_factory=list[Sum])
    loads: list[Load] = field(default_factory=list[Load])

    @property
    def writes(self) -> list[Load]:
        """The elements that the statements write."""
        return [statement.load for statement in (*self.stores, *self.sums)]


@dataclass(eq=False)
class Call:
    """A call of a function of the headers.

    Attributes:
        statement: C statement, with ``{first}`` and ``{end}`` in the places of the first row and
            the row after the last.
        rows: Division of the rows among threads; ``None`` where one thread does all.
        number: Number of rows.
        loads: What the call reads.
        writes: What the call writes.
    """

    statement: str
    rows: Rows | None
    number: int
    loads: list[Load]
    writes: list[Load]


def chunk_rows(number: int) -> int:
    """Rows of a chunk: about 64, so that all chunks are equal; where that cannot be, all rows."""
    sizes = [size for size in range(_ROWS // 2, 4 * _ROWS + 1) if number % size == 0]
    return min(sizes, key=lambda size: abs(size - _ROWS), default=number)
