"""``compile="max"`` on CUDA: a function captured as a CUDA graph, and replayed."""

from collections.abc import Callable

import torch
from torch import Tensor

from esper_lightning.compiling.tracing import Tree
from esper_lightning.core.tensor_trees import leaves, map_tree

__all__ = ["CapturedFunction"]


class CapturedFunction:
    """A function that is captured as a CUDA graph at its first call, and replayed afterwards.

    Arguments at other addresses than at the capture are copied to the addresses of the capture. The
    results are the same tensors at every call.

    Args:
        function: Function of trees of tensors, all on one GPU.
    """

    def __init__(self, function: Callable[..., Tree]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._args: list[Tensor] = []
        self._result: Tree = None

    def __call__(self, *args: Tree) -> Tree:
        """Replay the graph; the first call captures it."""
        if self._graph is None:
            self._capture(args)
        for static, value in zip(self._args, leaves(args), strict=True):
            if static.data_ptr() != value.data_ptr():
                static.copy_(value)
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _capture(self, args: tuple[Tree, ...]) -> None:
        """Capture the graph, after a warm-up on copies that leaves the arguments as they are."""
        self._args = leaves(args)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._function(*map_tree(torch.clone, args))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of loggers and watchdogs, may use CUDA during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._result = self._function(*args)
        self._graph = graph
