"""Functions and loops that run as native code, compiled for the shapes of their first call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper_lightning.compiling.native.drivers import (
    LoopShapes,
    function_text,
    loop_text,
    map_text,
)
from esper_lightning.compiling.native.program import Program, aligned
from esper_lightning.compiling.native.statements import chunk_rows
from esper_lightning.compiling.native.translation import translate
from esper_lightning.compiling.tracing import Body, ChunkBody, Traced, Tree
from esper_lightning.core.tensor_trees import leaves, map_tree

__all__ = ["NativeFunction", "NativeLoop", "NativeMap"]


class NativeFunction:
    """A function of trees of tensors as native code.

    Args:
        function: Pure function.
    """

    def __init__(self, function: Callable[..., Tree]) -> None:
        self._function = function
        self._program: Program | None = None

    def __call__(self, *args: Tree) -> Tree:
        """Run the function; the first call compiles."""
        flat = leaves(args)
        if self._program is None:
            traced = Traced(self._function, args, functional=True)
            body = translate(traced.graph, "body", shared=True)
            self._program = Program(
                function_text(body, len(flat) + len(body.captured)),
                results=traced.result,
                shared_bytes=body.work_bytes,
                own_bytes=0,
                captured=body.captured,
            )
        return self._program.run(flat, steps=1)


class NativeMap:
    """A function of rows as native code, which computes a few rows at a time.

    Args:
        function: Pure function ``(rows, constants) -> rows`` whose rows do not depend on each
            other.
    """

    def __init__(self, function: Callable[[Tree, Tree], Tree]) -> None:
        self._function = function
        self._program: Program | None = None
        self._chunks = 1

    def __call__(self, rows: Tree, constants: Tree) -> Tree:
        """Run the function; the first call compiles."""
        if self._program is None:
            self._program = self._build(rows, constants)
        return self._program.run(leaves((rows, constants)), steps=self._chunks)

    def _build(self, rows: Tree, constants: Tree) -> Program:
        number = leaves(rows)[0].shape[0]
        size = chunk_rows(number)
        self._chunks = chunks = number // size
        some = map_tree(lambda leaf: leaf[:size], rows)
        traced = Traced(self._function, (some, constants), functional=True)
        first, count = len(leaves(rows)), len(leaves((rows, constants)))
        body = translate(traced.graph, "body", shared=False, unchanged=range(first, count))
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

    def __call__(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        """Run the loop; the first call compiles. ``out`` is not used."""
        del out  # the program has memory of its own for its results
        if self._program is None:
            self._program = self._build(carry, xs, chunked, constants)
        flat = leaves((carry, xs, chunked, constants))
        return self._program.run(flat, steps=leaves((xs, chunked))[0].shape[0])

    def _build(self, carry: Tree, xs: Tree, chunked: Any, constants: Tree) -> Program:
        x = map_tree(lambda value: value[0], xs)
        carried, constant = len(leaves(carry)), len(leaves(constants))
        chunk, sums, chunks = None, list[Tensor](), 1
        if self._chunk_body is not None:
            size = chunk_rows(chunked.shape[1])
            chunks = chunked.shape[1] // size
            example = (carry, chunked[0, :size], constants)
            traced = Traced(self._chunk_body, example, functional=True)
            sums = leaves(traced.result)
            of_step = {*range(carried + 1 + constant)} - {carried}  # the same for all chunks
            chunk = translate(traced.graph, "chunk", shared=False, unchanged=of_step)
            zeros = map_tree(lambda leaf: torch.zeros_like(leaf, device="cpu"), traced.result)
            x = (zeros, x)
        traced = Traced(self._body, (carry, x, constants), functional=True)
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
