"""``compile="max"`` on CUDA: a function captured as a CUDA graph, and replayed."""

from collections.abc import Callable

import torch
from torch import Tensor

from esper_lightning.compiling.tracing import Tree
from esper_lightning.core.tensor_trees import leaves, map_tree

__all__ = ["CapturedFunction"]


class CapturedFunction:
    """A callable captured as a CUDA graph at its first call, and replayed afterwards.

    Arguments that live elsewhere than at the capture are copied to where they lived then; results
    are the same tensors at every call.
    """

    def __init__(self, function: Callable[..., Tree]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._args: list[Tensor] = []
        self._result: Tree = None

    def __call__(self, *args: Tree) -> Tree:
        """Replay the graph."""
        if self._graph is None:
            self._capture(args)
        for static, value in zip(self._args, leaves(args), strict=True):
            if static.data_ptr() != value.data_ptr():
                static.copy_(value)
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _capture(self, args: tuple[Tree, ...]) -> None:
        """Warm up on copies, so that nothing has happened before the first replay."""
        self._args = leaves(args)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._function(*map_tree(torch.clone, args))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: loggers, watchdogs.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._result = self._function(*args)
        self._graph = graph
