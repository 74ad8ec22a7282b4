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
)
from esper_lightning.core.tensor_trees import leaves, map_tree

__all__ = ["StepwiseLoop"]


class StepwiseLoop:
    """A loop whose compiled step is called ``T`` times and writes carry and rows in place.

    Args:
        body: Pure function of one step.
        chunk_body: Pure function of a chunk; ``None`` where the body needs no sums over chunks.
        device: Device of all tensors.
    """

    def __init__(self, body: Body, chunk_body: ChunkBody | None, device: torch.device) -> None:
        self._body, self._chunk_body, self._device = body, chunk_body, device
        self._run: Callable[..., Any] | None = None
        self._rows: Tree = None

    def __call__(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        """Run the loop; the first call compiles. Carry and rows are written in place."""
        steps = leaves((xs, chunked))[0].shape[0]
        index = torch.zeros(1, dtype=torch.int64, device=self._device)
        if self._run is None:
            self._build(carry, xs, chunked, constants, out, index)
        rows = self._rows if out is None else out
        tensors = leaves((carry, xs, chunked, constants, rows, index))
        assert self._run is not None
        with torch.no_grad():
            for _ in range(steps):
                self._run(*tensors)
        return carry, rows

    def _build(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree, index: Tensor
    ) -> None:
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
            steps = leaves((xs, chunked))[0].shape[0]
            self._rows = map_tree(
                lambda v: torch.empty(steps, *v.shape, dtype=v.dtype, device=self._device), row
            )
        example = (carry, xs, chunked, constants, self._rows if out is None else out, index)
        self._run = compile_graph(Traced(step, example).graph)
