"""``compile="default"``: one step of a loop is compiled, and Python calls it ``T`` times."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper_lightning.compiling.tracing import (
    Body,
    ChunkBody,
    Traced,
    Tree,
    compile_graph,
    count_operations,
)
from esper_lightning.core.tensor_trees import leaves, map_tree

__all__ = ["StepwiseLoop", "step_count"]


def step_count(xs: Tree, chunked: Any) -> int:
    """Number of steps of a loop, from its inputs."""
    return leaves((xs, chunked))[0].shape[0]


class StepwiseLoop:
    """A loop whose compiled step is called ``T`` times and writes carry and rows in place.

    Args:
        body: Pure function of one step.
        chunk_body: Pure function of a chunk; ``None`` where the body needs no sums over chunks.
        device: Device of all tensors.

    Attributes:
        operations: Number of operations of a step before they are compiled; 0 before ``prepare``.
    """

    def __init__(self, body: Body, chunk_body: ChunkBody | None, device: torch.device) -> None:
        self._body, self._chunk_body, self._device = body, chunk_body, device
        self._run: Callable[..., Any] | None = None
        self._rows: Tree = None
        self.operations = 0

    def __call__(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        """Run the loop; the first call compiles. Carry and rows are written in place."""
        index = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.prepare(index, carry, xs, chunked, constants, out)
        steps = step_count(xs, chunked)
        return self.advance(steps, index, carry, xs, chunked, constants, out)[1:]

    def advance(
        self,
        steps: int,
        index: Tensor,
        carry: Tree,
        xs: Tree,
        chunked: Any,
        constants: Tree,
        out: Tree,
    ) -> tuple[Tensor, Tree, Tree]:
        """Run the next steps of the loop, which has been prepared.

        Args:
            steps: Number of steps to run.
            index: ``[1]``, the number of the next step; it is advanced in place.
            carry: State before the next step; it is written in place.
            xs: Inputs of all steps.
            chunked: Inputs of the chunks of all steps.
            constants: Inputs that all steps share.
            out: Storage of all rows; ``None`` for storage of the loop's own.

        Returns:
            Index, carry and rows after the steps.
        """
        rows = self._rows if out is None else out
        tensors = leaves((carry, xs, chunked, constants, rows, index))
        assert self._run is not None
        with torch.no_grad():
            for _ in range(steps):
                self._run(*tensors)
        return index, carry, rows

    def prepare(
        self, index: Tensor, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree
    ) -> None:
        """Trace and compile the step for these arguments, once; nothing is computed.

        The arguments are those of ``advance``.
        """
        if self._run is not None:
            return

        def step(carry: Tree, xs: Tree, chunked: Any, constants: Tree, rows: Tree, index: Tensor):
            x, chunk = map_tree(lambda value: value.index_select(0, index)[0], (xs, chunked))
            if self._chunk_body is not None:
                x = (self._chunk_body(carry, chunk, constants), x)
            after, row = self._body(carry, x, constants)
            if rows is None:
                return row
            for storage, value in zip(leaves(rows), leaves(row), strict=True):
                storage.index_copy_(0, index, value[None])
            for buffer, value in zip(leaves(carry), leaves(after), strict=True):
                buffer.copy_(value)
            index.add_(1)
            return None

        if out is None:  # only a trace says how large the rows are
            row = Traced(step, (carry, xs, chunked, constants, None, index)).result
            steps = step_count(xs, chunked)
            self._rows = map_tree(
                lambda v: torch.empty(steps, *v.shape, dtype=v.dtype, device=self._device), row
            )
        example = (carry, xs, chunked, constants, self._rows if out is None else out, index)
        graph = Traced(step, example).graph
        self.operations = count_operations(graph)
        self._run = compile_graph(graph)
