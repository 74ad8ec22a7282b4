"""The C++ text of a kernel: its nests, its calls, and the memory that they use."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.statements import Call, Load, Nest, Rows, Sum
from esper_lightning.compiling.native.values import C_TYPES, Buffer, strided_index

__all__ = ["Source", "Translation"]

_ALIGNMENT = 64  # bytes
_SHORT = 8  # iterations of an innermost loop that is written out instead


class Translation(NamedTuple):
    """A graph in C++."""

    text: str  # of the functions NAME_pack and NAME
    work_bytes: int
    captured: list[Tensor]  # tensors that the graph holds: further inputs, after its arguments


class Source:
    """The C++ text of a kernel.

    The text holds two functions: ``NAME_pack``, which fills memory from constants, and ``NAME``.

    Args:
        kernel: Kernel whose groups are complete.

    Attributes:
        text: C++ text.
        work_bytes: Size of the memory that the functions work in.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._texts = self._resolved_texts()
        self._offsets: dict[Buffer, int] = {}
        self.work_bytes = 0
        for buffer in kernel.buffers:
            if buffer.kind in ("work", "packed") and buffer.is_read:
                self._offsets[buffer] = self.work_bytes
                size = buffer.numel * buffer.dtype.itemsize
                self.work_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.text = "\n".join([*kernel.functions, *self._packing(), *self._function()])

    def _resolved_texts(self) -> dict[int, str]:
        """The expressions of all statements by their identity.

        Only when all are resolved is it known which buffers are read.
        """
        kernel, texts = self._kernel, dict[int, str]()
        for number, group in enumerate(kernel.groups):
            if isinstance(group, Nest):
                for statement in (*group.stores, *group.sums):
                    texts[id(statement)] = kernel.resolve(statement.text, number)
        return texts

    def _pointer(self, buffer: Buffer) -> str:
        kind = C_TYPES[buffer.dtype]
        if buffer in self._offsets:
            return f"{kind}* __restrict {buffer.name} = ({kind}*)(work + {self._offsets[buffer]});"
        if buffer.kind == "input":
            number = self._kernel.inputs.index(buffer)
            return f"const {kind}* __restrict {buffer.name} = (const {kind}*)in[{number}];"
        number = self._kernel.outputs.index(buffer)
        return f"{kind}* __restrict {buffer.name} = ({kind}*)out[{number}];"

    def _packing(self) -> Iterator[str]:
        kernel = self._kernel
        yield f"NOINLINE static void {kernel.name}_pack(const void* const* in, char* work) {{"
        yield from (self._pointer(buffer) for buffer in kernel.inputs if kernel.is_constant(buffer))
        for statement, buffer in kernel.packing.items():
            yield self._pointer(buffer)
            yield statement.format(buffer.name)
        yield "}"

    def _function(self) -> Iterator[str]:
        kernel = self._kernel
        arguments = "const void* const* in, void* const* out, char* work, Team* team, int me"
        yield f"NOINLINE static void {kernel.name}({arguments}) {{"
        for buffer in kernel.buffers:
            if buffer.kind in ("input", "output") or buffer in self._offsets:
                yield self._pointer(buffer)
        divisions = {group.rows for group in kernel.groups if group.rows is not None}
        for rows in sorted(divisions):
            share = f"share({rows.number}, {rows.granularity}, team->size, me"
            yield f"const int64_t {_first(rows)} = {share}), {_end(rows)} = {share} + 1);"
        written: dict[Buffer, Rows | None] = {}
        scattered: set[Buffer] = set()
        for number, group in enumerate(kernel.groups):
            rows = group.rows
            if kernel.shared and any(
                load.buffer in scattered
                or written.get(load.buffer, rows) != rows
                or (load.buffer in written and rows is not None and not rows.holds(load))
                for load in group.loads
            ):
                yield "wait_for_all(team, me);"
                written.clear()
                scattered.clear()
            for load in group.writes:
                written[load.buffer] = rows
                if rows is not None and not rows.holds(load):
                    scattered.add(load.buffer)
            body = self._nest(group, number) if isinstance(group, Nest) else self._call(group)
            yield "if (me == 0) {" if kernel.shared and rows is None else "{"
            yield from body
            yield "}"
        yield "}"

    def _call(self, call: Call) -> Iterator[str]:
        first, end = ("0", str(call.number))
        if call.rows is not None:
            first, end = _first(call.rows), _end(call.rows)
        yield call.statement.format(first=first, end=end)

    def _nest(self, nest: Nest, number: int) -> Iterator[str]:
        loops = [axis for axis, extent in enumerate(nest.shape) if extent > 1]
        vector = _vector_loop(nest, loops)
        last = len(loops) - 1
        unrolled = last if vector is not None and vector < last else None
        for total in nest.sums:
            if total.partial or total.in_memory:
                yield from self._fill(total, nest)
        yield from _accumulators(nest, 0)
        for depth, axis in enumerate(loops):
            if depth == vector:
                yield "#pragma omp simd" + _clauses(nest, depth)
            if depth != unrolled:
                first, end = "0", str(nest.shape[axis])
                if depth == 0 and nest.rows is not None:
                    first, end = _first(nest.rows), _end(nest.rows)
                yield f"for (int64_t i{axis} = {first}; i{axis} < {end}; i{axis}++) {{"
                yield from _accumulators(nest, depth + 1)
        body = list(self._body(nest, number))
        if unrolled is None:
            yield from body
        else:
            for at in range(nest.shape[loops[unrolled]]):
                yield f"{{ constexpr int64_t i{loops[unrolled]} = {at};"
                yield from body
                yield "}"
        for depth in range(len(loops) - 1, -1, -1):
            if depth != unrolled:
                yield from self._results(nest, depth + 1, number)
                yield "}"
        yield from self._results(nest, 0, number)

    def _body(self, nest: Nest, number: int) -> Iterator[str]:
        for store in nest.stores:
            text, target = self._texts[id(store)], self._element(store.load, number)
            if store.variable is None:
                yield f"{target} = {text};"
                continue
            yield f"const {C_TYPES[store.load.buffer.dtype]} {store.variable} = {text};"
            if store.load.buffer.is_read:
                yield f"{target} = {store.variable};"
        for total in nest.sums:
            accumulator = _accumulator(total)
            if total.in_memory:
                accumulator = self._element(total.load, number)
            yield total.combine.format(a=accumulator, x=self._texts[id(total)])

    def _results(self, nest: Nest, depth: int, number: int) -> Iterator[str]:
        """What follows the loops at a depth: the results of the accumulators declared there."""
        for total in nest.sums:
            if total.depth == depth and not total.in_memory:
                target = self._element(total.load, number)
                if total.partial:
                    yield total.combine.format(a=target, x=_accumulator(total))
                else:
                    yield f"{target} = {_accumulator(total)};"

    def _fill(self, total: Sum, nest: Nest) -> Iterator[str]:
        buffer, first, end = total.load.buffer, "0", str(total.load.buffer.numel)
        if nest.rows is not None:
            row = buffer.numel // nest.rows.number
            first, end = f"{_first(nest.rows)} * {row}", f"{_end(nest.rows)} * {row}"
        yield f"for (int64_t k = {first}; k < {end}; k++) {buffer.name}[k] = {total.start};"

    def _element(self, load: Load, number: int) -> str:
        index = self._kernel.resolve(strided_index(load.view, load.index), number)
        return f"{load.buffer.name}[{index}]"


def _first(rows: Rows) -> str:
    return f"first_{rows.number}"


def _end(rows: Rows) -> str:
    return f"end_{rows.number}"


def _accumulator(total: Sum) -> str:
    return f"a_{total.load.buffer.name}"


def _accumulators(nest: Nest, depth: int) -> Iterator[str]:
    """Declarations of the accumulators at a depth: of sums over all loops further in."""
    for total in nest.sums:
        if total.depth == depth and not total.in_memory:
            yield f"{C_TYPES[total.dtype]} {_accumulator(total)} = {total.start};"


def _vector_loop(nest: Nest, loops: list[int]) -> int | None:
    """Depth of the loop whose iterations become vector instructions; ``None`` for no loop.

    This is the innermost loop. Where that is short it is written out, and the loop around it is
    taken, unless its iterations add to the same memory.
    """
    if nest.in_order or not loops:
        return None
    last = len(loops) - 1
    if nest.shape[loops[last]] >= _SHORT:
        return last
    if last == 0 or nest.shape[loops[last - 1]] < _SHORT:
        return None
    around = loops[last - 1]
    if any((total.in_memory or total.partial) and around not in total.kept for total in nest.sums):
        return None
    return last - 1


def _clauses(nest: Nest, depth: int) -> str:
    """The accumulators that the iterations of a loop share."""
    shared = [t for t in nest.sums if t.depth <= depth and not t.in_memory]
    operators = sorted({total.clause for total in shared})
    return "".join(
        f" reduction({one}:{','.join(_accumulator(t) for t in shared if t.clause == one)})"
        for one in operators
    )
