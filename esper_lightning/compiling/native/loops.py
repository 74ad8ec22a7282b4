"""Functions and loops that run as native code, compiled for the shapes of their first call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper_lightning.compiling.native.drivers import (
    LoopShapes,
    function_text,
    loop_text,
    map_text,
)
from esper_lightning.compiling.native.mixing import refuse_mixed_rows, refuse_other_sums
from esper_lightning.compiling.native.program import Program, aligned
from esper_lightning.compiling.native.statements import chunk_rows
from esper_lightning.compiling.native.translation import translate
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.purity import results_of_pure
from esper_lightning.compiling.reads import Reads, recorded
from esper_lightning.compiling.tracing import Body, ChunkBody, Traced, Tree
from esper_lightning.core.tensor_trees import leaves, map_tree

__all__ = ["NativeFunction", "NativeLoop", "NativeMap"]

_OTHER_SUMS = "a sum over samples whose terms depend on other samples"
_MIXED_ROWS = "rows that depend on each other"


class NativeFunction:
    """A function of trees of tensors as native code.

    Args:
        function: Pure function.
    """

    def __init__(self, function: Callable[..., Tree]) -> None:
        self._function = function
        self._program: Program | None = None
        self.reads = list[Reads]()

    def __call__(self, *args: Tree) -> Tree:
        """Run the function; the first call compiles."""
        return self.prepare(*args).run(leaves(args), steps=1)

    def prepare(self, *args: Tree) -> Program:
        """Compile the function for these arguments, once."""
        if self._program is None:
            traced = _traced(self._function, args, self.reads)
            body = translate(traced.graph, "body", shared=True)
            self._program = Program(
                function_text(body, len(leaves(args)) + len(body.captured)),
                results=traced.result,
                shared_bytes=body.work_bytes,
                own_bytes=0,
                captured=body.captured,
            )
        return self._program


class NativeMap:
    """A function of rows as native code, which computes a few rows at a time.

    Args:
        function: Pure function ``(rows, constants) -> rows`` whose rows do not depend on each
            other.
    """

    def __init__(self, function: Callable[[Tree, Tree], Tree]) -> None:
        self._function = function
        self._program: Program | None = None
        self.reads = list[Reads]()
        self._chunks = 1

    def __call__(self, rows: Tree, constants: Tree) -> Tree:
        """Run the function; the first call compiles."""
        program = self.prepare(rows, constants)
        return program.run(leaves((rows, constants)), steps=self._chunks)

    def prepare(self, rows: Tree, constants: Tree) -> Program:
        """Compile the function for these arguments, once."""
        if self._program is None:
            self._program = self._build(rows, constants)
        return self._program

    def _build(self, rows: Tree, constants: Tree) -> Program:
        number = leaves(rows)[0].shape[0]
        size = chunk_rows(number)
        self._chunks = chunks = number // size
        some = map_tree(lambda leaf: leaf[:size], rows)
        traced = _traced(self._function, (some, constants), self.reads)
        first, count = len(leaves(rows)), len(leaves((rows, constants)))
        body = translate(traced.graph, "body", shared=False, unchanged=range(first, count))
        if chunks > 1:
            larger = Traced(self._function, (rows, constants), functional=True)
            refuse_mixed_rows(traced.graph, larger.graph, range(first), _MIXED_ROWS)
        others = count - first + len(body.captured)
        return Program(
            map_text(body, leaves(some), others, leaves(traced.result)),
            results=map_tree(
                lambda leaf: leaf.repeat(chunks, *[1] * (leaf.dim() - 1)), traced.result
            ),
            shared_bytes=0,
            own_bytes=aligned(body.work_bytes),
            captured=body.captured,
        )


class NativeLoop:
    """A loop as native code, without Python between its steps.

    Args:
        body: Pure function of one step.
        chunk_body: Pure function of a chunk; ``None`` where the body needs no sums over chunks.
    """

    def __init__(self, body: Body, chunk_body: ChunkBody | None) -> None:
        self._body, self._chunk_body = body, chunk_body
        self._program: Program | None = None
        self.reads = list[Reads]()

    def __call__(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        """Run the loop; the first call compiles. ``out`` is not used."""
        program = self.prepare(carry, xs, chunked, constants, out)
        flat = leaves((carry, xs, chunked, constants))
        return program.run(flat, steps=leaves((xs, chunked))[0].shape[0])

    def prepare(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> Program:
        """Compile the loop for these arguments, once."""
        del out  # the program has memory of its own for its results
        if self._program is None:
            self._program = self._build(carry, xs, chunked, constants)
        return self._program

    def _build(self, carry: Tree, xs: Tree, chunked: Any, constants: Tree) -> Program:
        x = map_tree(lambda value: value[0], xs)
        carried, constant = len(leaves(carry)), len(leaves(constants))
        chunk, sums, chunks = None, list[Tensor](), 1
        if self._chunk_body is not None:
            size = chunk_rows(chunked.shape[1])
            chunks = chunked.shape[1] // size
            example = (carry, chunked[0, :size], constants)
            traced = _traced(self._chunk_body, example, self.reads)
            sums = leaves(traced.result)
            of_step = {*range(carried + 1 + constant)} - {carried}  # the same for all chunks
            chunk = translate(traced.graph, "chunk", shared=False, unchanged=of_step)
            if chunks > 1:
                whole = (carry, chunked[0], constants)
                larger = Traced(self._chunk_body, whole, functional=True)
                index = range(carried, carried + 1)
                refuse_other_sums(traced.graph, larger.graph, index, _OTHER_SUMS)
            zeros = map_tree(lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype), traced.result)
            x = (zeros, x)
        traced = _traced(self._body, (carry, x, constants), self.reads)
        _refuse_changed_carry(leaves(carry), leaves(traced.result)[:carried])
        first = carried + len(leaves(x))
        unchanged = range(first, first + constant)
        body = translate(traced.graph, "body", shared=True, unchanged=unchanged)
        results = leaves(traced.result)
        shapes = LoopShapes(
            carry=leaves(carry),
            xs=leaves(xs),
            chunked=leaves(chunked),
            constants=leaves(constants),
            sums=sums,
            rows=results[carried:],
        )
        text, shared_bytes, own_bytes = loop_text(shapes, body, chunk, chunks)
        captured = [*body.captured, *([] if chunk is None else chunk.captured)]
        after, row = traced.result
        steps = leaves((xs, chunked))[0].shape[0]
        rows = map_tree(lambda leaf: leaf.expand(steps, *leaf.shape), row)
        return Program(
            text,
            results=(after, rows),
            shared_bytes=shared_bytes,
            own_bytes=own_bytes,
            captured=captured,
        )


def _refuse_changed_carry(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Refuse a step whose carry has other shapes or dtypes than the carry before it."""
    for old, new in zip(before, after, strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            kinds = [f"{leaf.dtype} {list(leaf.shape)}" for leaf in (old, new)]
            raise UnsupportedError(f"a state that is {kinds[0]} before a step and {kinds[1]} after")


def _traced(function: Callable[..., Tree], args: tuple[Tree, ...], found: list[Reads]) -> Traced:
    """A pure function as a graph; adds what it read of users' objects to what was found.

    Raises:
        ImpureError: If the function is not pure.
    """
    with recorded(function) as reads:
        results_of_pure(function, *args)
    traced = Traced(function, args, functional=True)
    reads.leave_out([*leaves(args), *traced.held])
    found.append(reads)
    return traced
