"""Statements of a generated function, grouped into nests of loops.

A value that is needed once is computed where it is needed. Any other value is stored, by a
statement in a nest of loops over its shape. Statements over the same shape share a nest where the
order of reads and writes allows it, so that intermediate values stay in registers: a value that is
read only within its nest is never written to memory.

With a team of threads, the rows of large nests and products are divided among the threads. A thread
waits for the others only before it reads what others wrote.
"""

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from esper_lightning.compiling.native.statements import Call, Load, Nest, Rows, Store, Sum
from esper_lightning.compiling.native.values import (
    C_TYPES,
    Buffer,
    Index,
    Shape,
    UnsupportedError,
    Value,
    canonical_index,
    contiguous_view,
    literal,
    strided_index,
)

__all__ = ["Kernel"]

_TOKEN = re.compile(r"«(\d+)»")
_FEWEST_SHARED = 4096  # elements of a nest that are worth a division among threads
_SUMMED_IN_SINGLE = 512  # numbers that are summed in float32; more are summed in float64


class Kernel:
    """One traced function as one C++ function.

    Args:
        name: Name of the function in the code.
        shared: Whether a team of threads runs the function together.

    Attributes:
        name: Name of the function in the code.
        shared: Whether a team of threads runs the function together.
        groups: Nests and calls, in the order in which they run.
        buffers: All memory of the function.
        inputs: Arguments of the function.
        outputs: Results of the function.
        packing: Statements that fill the buffers of kind ``packed``.
        checked: Values that have been checked, each with what is wrong of an element.
        functions: Text of the C++ functions that only this one calls.
    """

    def __init__(self, name: str, *, shared: bool) -> None:
        self.name, self.shared = name, shared
        self.groups: list[Nest | Call] = []
        self.buffers: list[Buffer] = []
        self.inputs: list[Buffer] = []
        self.outputs: list[Buffer] = []
        self.packing: dict[str, Buffer] = {}
        self.checked: set[tuple[object, ...]] = set()
        self.functions: list[str] = []
        self._constants: set[Buffer] = set()
        self._loads: list[Load] = []

    # Buffers

    def new_buffer(self, dtype: torch.dtype, numel: int) -> Buffer:
        """Scratch memory."""
        if dtype not in C_TYPES:
            raise UnsupportedError(f"{dtype}")
        buffer = Buffer(f"b{len(self.buffers)}", dtype, max(1, numel), "work")
        self.buffers.append(buffer)
        return buffer

    def new_value(self, shape: Shape, dtype: torch.dtype) -> Value:
        """A value in scratch memory, which a call is to fill."""
        buffer = self.new_buffer(dtype, math.prod(shape))
        return Value(shape, dtype, buffer=buffer, view=contiguous_view(shape, dtype))

    def add_input(self, shape: Shape, dtype: torch.dtype, *, is_constant: bool) -> Value:
        """A contiguous argument of the function.

        Args:
            shape: Extent of each axis.
            dtype: Type of the elements.
            is_constant: Whether the argument is the same in all calls of a loop.
        """
        buffer = self.new_buffer(dtype, math.prod(shape))
        buffer.kind = "input"
        self.inputs.append(buffer)
        if is_constant:
            self._constants.add(buffer)
        return Value(shape, dtype, buffer=buffer, view=contiguous_view(shape, dtype))

    def add_output(self, value: Value) -> None:
        """A contiguous result of the function, which shares no memory with other results."""
        buffer = value.buffer
        if buffer is not None and buffer.kind == "work" and buffer.numel == max(1, value.numel):
            _, view = value.place
            if view.is_contiguous() and view.storage_offset() == 0:
                buffer.kind, buffer.is_read = "output", True
                self.outputs.append(buffer)
                return
        buffer = self.new_buffer(value.dtype, value.numel)
        buffer.kind, buffer.is_read = "output", True
        self.outputs.append(buffer)
        self._store(value, buffer, contiguous_view(value.shape, value.dtype), whole=True)

    def is_constant(self, buffer: Buffer) -> bool:
        """Whether memory holds the same in all calls of a loop."""
        return buffer in self._constants

    def packed(self, statement: str, dtype: torch.dtype, numel: int) -> Buffer:
        """Memory that is filled from a constant, once before a loop instead of in each step.

        Args:
            statement: Statement with ``{}`` in the place of the memory.
            dtype: Type of the elements.
            numel: Number of elements.
        """
        if statement not in self.packing:
            buffer = self.new_buffer(dtype, numel)
            buffer.kind, buffer.is_read = "packed", True
            self.packing[statement] = buffer
        return self.packing[statement]

    # Reading

    def element(self, value: Value, index: Index) -> str:
        """The C expression of one element."""
        if value.expression is not None:
            return value.expression(index)
        self._loads.append(Load(*value.place, tuple(index)))
        return f"«{len(self._loads) - 1}»"

    def broadcast(self, value: Value, index: Index, dtype: torch.dtype) -> str:
        """The element that broadcasting aligns with an index, converted to a type."""
        own = index[len(index) - len(value.shape) :]
        own = ["0" if extent == 1 else at for at, extent in zip(own, value.shape, strict=True)]
        text = self.element(value, own)
        if value.dtype == dtype:
            return text
        becomes_whole = value.dtype.is_floating_point and not dtype.is_floating_point
        cast = "f_whole<{}>" if becomes_whole and dtype != torch.bool else "({})"
        return f"({cast.format(C_TYPES[dtype])}({text}))"

    def resolve(self, text: str, number: int) -> str:
        """A statement of a nest, with variables or memory in the place of what it reads."""

        def replace(match: re.Match[str]) -> str:
            load = self._loads[int(match[1])]
            if self._is_local(load, number):
                assert load.buffer.local is not None
                return load.buffer.local[1]
            load.buffer.is_read = True
            index = self.resolve(strided_index(load.view, load.index), number)
            return f"{load.buffer.name}[{index}]"

        return _TOKEN.sub(replace, text)

    # Writing

    def stored(self, value: Value, *, in_order: bool = False) -> Value:
        """The value in memory, or at least in a variable of its nest.

        Args:
            value: Value to store.
            in_order: Whether the elements are computed one after another, and not as vectors.
        """
        if value.buffer is None:
            buffer = self.new_buffer(value.dtype, value.numel)
            view = contiguous_view(value.shape, value.dtype)
            self._store(value, buffer, view, whole=True, in_order=in_order)
            value.buffer, value.view, value.expression = buffer, view, None
            value.is_constant = False
        return value

    def named(self, value: Value) -> Value:
        """A value that an expression may contain more than once."""
        return value if value.is_constant else self.stored(value)

    def write(self, value: Value, buffer: Buffer, view: Tensor) -> None:
        """Write a value to a view of a buffer that several statements fill."""
        self._store(value, buffer, view, whole=False)

    def _store(
        self, value: Value, buffer: Buffer, view: Tensor, *, whole: bool, in_order: bool = False
    ) -> None:
        index = canonical_index(value.shape)
        text = self.element(value, index)
        number, nest = self._nest_for(value.shape, text, in_order=in_order)
        variable = f"v_{buffer.name}" if whole else None
        if variable is not None:
            buffer.local = (number, variable, strided_index(view, index))
        nest.stores.append(Store(text, Load(buffer, view, tuple(index)), variable))
        buffer.writer = max(buffer.writer, number)

    def reduce(
        self,
        value: Value,
        axes: Sequence[int],
        shape: Shape,
        *,
        dtype: torch.dtype,
        start: object,
        combine: str,
        clause: str,
    ) -> Value:
        """Accumulate a value over axes.

        Args:
            value: Value to reduce.
            axes: Axes to reduce, not negative.
            shape: Shape of the result: without the axes, or with extent 1 in their place.
            dtype: Type of the result.
            start: Result where there is no element.
            combine: C statement that adds the element ``{x}`` to the accumulator ``{a}``.
            clause: Operator of OpenMP's ``reduction``; empty if the order of elements matters.
        """
        full = value.shape
        loops = [axis for axis, extent in enumerate(full) if extent > 1]
        kept = [axis for axis in loops if axis not in axes]
        count = math.prod(full[axis] for axis in axes)
        wide = clause == "+" and dtype == torch.float32 and count > _SUMMED_IN_SINGLE
        kind = torch.float64 if wide else dtype
        buffer = self.new_buffer(kind, math.prod(shape))
        index = canonical_index(full)
        text = self.broadcast(value, index, kind)
        crosses = bool(loops) and loops[0] not in kept  # then rows of different threads meet
        number, nest = self._nest_for(full, text, in_order=not clause, one_thread=crosses)
        depth = loops.index(kept[-1]) + 1 if kept else 0
        within = contiguous_view(tuple(full[axis] for axis in kept), kind)
        nest.sums.append(
            Sum(
                text,
                Load(buffer, within, tuple(index[axis] for axis in kept)),
                kind,
                literal(start, kind),
                combine,
                clause,
                depth,
                partial=loops[:depth] != kept,
                in_memory=bool(loops) and depth == len(loops),
                kept=tuple(kept),
            )
        )
        buffer.writer, buffer.is_read = number, True
        result = Value(shape, kind, buffer=buffer, view=contiguous_view(shape, kind))
        if kind == dtype:
            return result
        return Value(shape, dtype, lambda index: self.broadcast(result, index, dtype))

    def call(
        self,
        statement: str,
        *,
        reads: Iterable[Value] = (),
        reads_by_row: Iterable[Value] = (),
        writes: Iterable[Value] = (),
        writes_by_row: Iterable[Value] = (),
        scratch: Buffer | None = None,
        number: int = 1,
    ) -> None:
        """Call a function of the headers, or a function that only this kernel calls.

        Args:
            statement: C statement, with ``{first}`` and ``{end}`` in the places of the first row
                and the row after the last.
            reads: Values in memory that the call reads whole.
            reads_by_row: Values in memory of which the call reads the rows that it computes.
            writes: Values in memory of which a row of the call writes any elements.
            writes_by_row: New values of which a row of the call writes the same row, where the
                value is seen as ``number`` rows.
            scratch: Memory in which each row has a part of its own.
            number: Number of rows. Calls for some of them give the same rows, so the threads may
                divide them.
        """
        loads = [Load(*value.place, ()) for value in reads]
        for value in reads_by_row:
            buffer, view = value.place
            loads.append(Load(buffer, view, ("i0", *["?"] * (view.dim() - 1))))
        targets = [Load(*value.place, ()) for value in writes]
        for value in writes_by_row:
            buffer, _ = value.place
            by_row = contiguous_view((number, buffer.numel // number), buffer.dtype)
            targets.append(Load(buffer, by_row, ("i0", "?")))
        for load in targets:
            load.buffer.writer = len(self.groups)
        for buffer in (load.buffer for load in (*loads, *targets)):
            buffer.is_read = True
        if scratch is not None:
            scratch.is_read = True
        large = number > 1 and any(load.buffer.numel >= _FEWEST_SHARED for load in targets)
        rows = Rows(number) if self.shared and large else None
        self.groups.append(Call(statement, rows, number, loads, targets))

    def _nest_for(
        self, shape: Shape, text: str, *, in_order: bool = False, one_thread: bool = False
    ) -> tuple[int, Nest]:
        """The latest nest over a shape in which a statement may stand; a new one if there is none.

        Args:
            shape: Extent of each loop.
            text: Expression of the statement.
            in_order: Whether the elements are computed one after another, and not as vectors.
            one_thread: Whether one thread must run the whole nest.
        """
        loads = self._loads_in(text)
        large = math.prod(shape) >= _FEWEST_SHARED and shape[0] > 1
        rows = Rows(shape[0]) if self.shared and large and not one_thread else None
        earliest = max([load.buffer.writer for load in loads], default=-1)
        for number in range(len(self.groups) - 1, max(earliest, 0) - 1, -1):
            group = self.groups[number]
            if (
                isinstance(group, Nest)
                and (group.shape, group.rows, group.in_order) == (shape, rows, in_order)
                and all(
                    load.buffer.writer < number or self._is_local(load, number) for load in loads
                )
            ):
                group.loads += loads
                return number, group
        nest = Nest(shape, rows, in_order, loads=loads)
        self.groups.append(nest)
        return len(self.groups) - 1, nest

    def _loads_in(self, text: str) -> list[Load]:
        found: list[Load] = []
        for token in _TOKEN.findall(text):
            load = self._loads[int(token)]
            found.append(load)
            for index in load.index:
                found += self._loads_in(index)
        return found

    def _is_local(self, load: Load, number: int) -> bool:
        local = load.buffer.local
        if local is None or local[0] != number:
            return False
        return self.resolve(strided_index(load.view, load.index), number) == local[2]
