"""``compile="max"`` on a CPU: a loop as one compiled program, in chunks that fit the caches."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper_lightning.compiling.tracing import Body, Part, Traced, Tree, compile_graph
from esper_lightning.core.tensor_trees import leaves, map_tree, rebuild

__all__ = ["ScanLoop", "count_chunks"]

_ROWS_IN_CACHE = 1024  # of 64 features: activations of one thread then stay in its L2 cache


class ScanLoop:
    """The whole loop as one compiled program (CPU): no Python between its steps."""

    def __init__(self, body: Body, part: Part | None, device: torch.device) -> None:
        self._body, self._part, self._device = body, part, device
        self._run: Callable[..., Any] | None = None
        self._result: Tree = None
        self._chunks = 1

    def __call__(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        """Run the loop; ``out`` is not used."""
        del out  # the program allocates what it returns
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
        """Trace body and part, then compile the loop over them: two loops where steps are cut."""
        from torch._higher_order_ops.scan import scan  # noqa: PLC0415 - a prototype of torch's

        x, chunk = map_tree(lambda value: value[0], (xs, chunked))
        part, sums, many = None, list[Tensor](), self._chunks > 1
        if self._part is not None:
            one = chunk[0] if many else chunk
            traced_part = Traced(self._part, (carry, one, constants), self._device)
            part, sums = traced_part.graph, leaves(traced_part.result)
            zeros = map_tree(lambda t: torch.zeros_like(t, device="cpu"), traced_part.result)
            x = (zeros, x)
        traced = Traced(self._body, (carry, x, constants), self._device)
        body, self._result = traced.graph, traced.result
        num_carry = len(leaves(carry))

        def program(carry: list[Tensor], xs: list[Tensor], constants: list[Tensor]) -> Any:
            def step(carry: list[Tensor], xs: list[Tensor]) -> Any:
                total: list[Tensor] = []
                x = xs
                if part is not None:
                    *x, chunk = xs

                    def accumulate(total: list[Tensor], chunk: Tensor) -> Any:
                        more: list[Tensor] = part(*carry, chunk, *constants)  # pyright: ignore[reportOptionalCall]
                        after = [a + b for a, b in zip(total, more, strict=True)]
                        return after, chunk[:1].clone()

                    if many:
                        zeros = [torch.zeros(s.shape, dtype=s.dtype) for s in sums]
                        total, _ = scan(accumulate, zeros, chunk)
                    else:
                        total = part(*carry, chunk, *constants)
                results = body(*carry, *total, *x, *constants)
                return list(results[:num_carry]), list(results[num_carry:])

            return scan(step, carry, xs)

        # torch.compile counts recompilations by code object: this one is to have its own.
        own = types.FunctionType(
            program.__code__.replace(), program.__globals__, "program", None, program.__closure__
        )
        self._run = compile_graph(own, cpp_wrapper=True)


def count_chunks(rows: int) -> int:
    """Number of chunks of equal size, of about as many rows as fit the caches of all threads."""
    most = _ROWS_IN_CACHE * torch.get_num_threads()
    for count in range(max(1, -(-rows // most)), rows // (most // 4) + 1):
        if rows % count == 0:
            return count
    return 1
