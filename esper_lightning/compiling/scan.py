"""``compile="max"`` on a CPU: a loop as one compiled program, in chunks that fit the caches."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper_lightning.compiling.tracing import (
    Body,
    ChunkBody,
    Tree,
    compile_graph,
    traced_for_inductor,
)
from esper_lightning.core.tensor_trees import leaves, map_tree, rebuild

__all__ = ["ScanLoop", "ScanMap", "count_chunks"]

# Rows of 64 features whose activations stay in the L2 cache of one thread.
_ROWS_IN_CACHE = 1024


class ScanLoop:
    """The whole loop as one compiled program on a CPU, without Python between its steps.

    Args:
        body: Pure function of one step.
        chunk_body: Pure function of a chunk; ``None`` where the body needs no sums over chunks.
        device: Device of all tensors.
    """

    def __init__(self, body: Body, chunk_body: ChunkBody | None, device: torch.device) -> None:
        self._body, self._chunk_body, self._device = body, chunk_body, device
        self._run: Callable[..., Any] | None = None
        self._result: Tree = None
        self._chunks = 1

    def __call__(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        """Run the loop; the first call compiles. ``out`` is not used."""
        del out  # the program allocates its results itself
        if chunked is not None and self._run is None:
            self._chunks = count_chunks(chunked.shape[1])
        if chunked is not None and self._chunks > 1:
            chunked = chunked.unflatten(1, (self._chunks, -1))
        if self._run is None:
            self._build(carry, xs, chunked, constants)
        assert self._run is not None
        with torch.no_grad():
            after, rows = self._run(leaves(carry), leaves((xs, chunked)), leaves(constants))
        return rebuild(self._result, [*after, *rows])

    def _build(self, carry: Tree, xs: Tree, chunked: Any, constants: Tree) -> None:
        """Trace the bodies of step and chunk, then compile the loop over them.

        Where steps are cut into chunks, a second loop over the chunks lies within the first.
        """
        from torch._higher_order_ops.scan import scan  # noqa: PLC0415 - a prototype of torch's

        x, chunk = map_tree(lambda value: value[0], (xs, chunked))
        chunk_body, sums, many = None, list[Tensor](), self._chunks > 1
        if self._chunk_body is not None:
            one = chunk[0] if many else chunk
            traced_chunk_body = traced_for_inductor(
                self._chunk_body, (carry, one, constants), self._device
            )
            chunk_body, sums = traced_chunk_body.graph, leaves(traced_chunk_body.result)
            zeros = map_tree(lambda t: torch.zeros_like(t, device="cpu"), traced_chunk_body.result)
            x = (zeros, x)
        traced = traced_for_inductor(self._body, (carry, x, constants), self._device)
        body, self._result = traced.graph, traced.result
        num_carry = len(leaves(carry))

        def program(carry: list[Tensor], xs: list[Tensor], constants: list[Tensor]) -> Any:
            def step(carry: list[Tensor], xs: list[Tensor]) -> Any:
                total: list[Tensor] = []
                x = xs
                if chunk_body is not None:
                    *x, chunk = xs

                    def accumulate(total: list[Tensor], chunk: Tensor) -> Any:
                        more: list[Tensor] = chunk_body(*carry, chunk, *constants)  # pyright: ignore[reportOptionalCall]
                        after = [a + b for a, b in zip(total, more, strict=True)]
                        return after, chunk[:1].clone()

                    if many:
                        zeros = [torch.zeros(s.shape, dtype=s.dtype) for s in sums]
                        total, _ = scan(accumulate, zeros, chunk)
                    else:
                        total = chunk_body(*carry, chunk, *constants)
                results = body(*carry, *total, *x, *constants)
                return list(results[:num_carry]), list(results[num_carry:])

            return scan(step, carry, xs)

        # torch.compile counts recompilations by code object, so each program gets its own.
        own = types.FunctionType(
            program.__code__.replace(), program.__globals__, "program", None, program.__closure__
        )
        self._run = compile_graph(own, cpp_wrapper=True)


def count_chunks(rows: int) -> int:
    """Number of equal chunks, each of about as many rows as fit the caches of all threads."""
    most = _ROWS_IN_CACHE * torch.get_num_threads()
    for count in range(max(1, -(-rows // most)), rows // (most // 4) + 1):
        if rows % count == 0:
            return count
    return 1


class ScanMap:
    """A function of rows as one compiled program on a CPU, which computes a chunk at a time.

    Args:
        function: Pure function ``(rows, constants) -> rows`` whose rows do not depend on each
            other.
        device: Device of all tensors.
    """

    def __init__(self, function: Callable[[Tree, Tree], Tree], device: torch.device) -> None:
        def body(counter: Tensor, rows: Tree, constants: Tree) -> tuple[Tensor, Tree]:
            return counter + 1.0, function(rows, constants)

        self._loop = ScanLoop(body, None, device)

    def __call__(self, rows: Tree, constants: Tree) -> Tree:
        """Run the function; the first call compiles."""
        chunks = count_chunks(leaves(rows)[0].shape[0])

        def cut(value: Tensor) -> Tensor:
            return value.reshape(chunks, -1, *value.shape[1:])

        xs = map_tree(cut, rows)
        _, results = self._loop(torch.zeros(()), xs, None, constants)  # a loop carries something
        return map_tree(_joined, results)


def _joined(value: Tensor) -> Tensor:
    return value.flatten(0, 1)  # [chunk, row, ...] -> [row, ...]
