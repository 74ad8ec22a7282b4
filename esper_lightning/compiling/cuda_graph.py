"""``compile="max"`` on CUDA: functions and loops captured as CUDA graphs, and replayed.

Each live graph has a stream for itself. cuBLAS has a workspace for each stream, of up to 32 MiB:
graphs that shared a stream would share the workspace, which the first of them to be destroyed takes
along (pytorch/pytorch#193402), and a new stream for each graph would keep a workspace for each
graph that ever was.
"""

import contextlib
import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esper_lightning.compiling.stepwise import StepwiseLoop, step_count
from esper_lightning.compiling.tracing import MOST_OPERATIONS, Tree
from esper_lightning.core.tensor_trees import leaves, map_tree

__all__ = ["CapturedFunction", "CapturedLoop"]

_STREAMS_OF_TORCH = 32  # of a device, which torch hands out in turn
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. The allocator may still point to them: they are never destroyed."""


class CapturedFunction:
    """A function that is captured as a CUDA graph at its first call, and replayed afterwards.

    Arguments at other addresses than at the capture are copied to the addresses of the capture. The
    results are the same tensors at every call.

    Args:
        function: Function of trees of tensors, all on one GPU.
        replays: Number of times that a call runs the function, on what the arguments have become.
    """

    def __init__(self, function: Callable[..., Tree], *, replays: int = 1) -> None:
        self._function, self._replays = function, replays
        self._graph: torch.cuda.CUDAGraph | None = None
        self._args: list[Tensor] = []
        self._result: Tree = None

    def __call__(self, *args: Tree) -> Tree:
        """Replay the graph; the first call captures it.

        Raises:
            RuntimeError: If the function cannot be captured, or an earlier capture failed.
        """
        if self._graph is None:
            self._capture(args)
        for static, value in zip(self._args, leaves(args), strict=True):
            if static.data_ptr() != value.data_ptr():
                static.copy_(value)
        assert self._graph is not None
        for _ in range(self._replays):
            self._graph.replay()
        return self._result

    def _capture(self, args: tuple[Tree, ...]) -> None:
        """Capture the graph, after a warm-up on copies that leaves the arguments as they are."""
        if _failed:
            raise RuntimeError("The capture of another CUDA graph failed in this process")
        gc.collect()  # graphs of environments that nobody uses any more, and their memory
        self._args = leaves(args)
        device = self._args[0].device
        with torch.cuda.device(device):
            streams = _streams[device]
            current, side = torch.cuda.current_stream(), streams.take(device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._function(*map_tree(torch.clone, args))
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            generator = torch.cuda.default_generators[device.index]
            state = generator.get_state()
            try:
                # Other threads, such as those of loggers and watchdogs, may use CUDA meanwhile.
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    result = self._function(*args)
            except BaseException:
                torch.cuda.set_stream(current)  # torch leaves it only if the capture can be ended
                _failed.append(graph)
                # It would go on as if captured, and every draw would fail. A device that is lost
                # has no generators, which must not hide the error.
                with contextlib.suppress(RuntimeError):
                    fresh = torch.Generator(device)
                    fresh.set_state(state)
                    generator.graphsafe_set_state(fresh)
                raise
        weakref.finalize(graph, streams.give_back, side)
        self._graph, self._result = graph, result


class CapturedLoop:
    """A loop of which a few steps are captured as a CUDA graph, and replayed until all are done.

    Every operation is a node of the graph, which costs memory and the time of the capture. So the
    size of the graph, and not the number of steps, is bounded.

    Args:
        loop: The loop, whose steps are compiled.
        device: Device of all tensors.
    """

    def __init__(self, loop: StepwiseLoop, device: torch.device) -> None:
        self._loop, self._device = loop, device
        self._captured: CapturedFunction | None = None
        self._steps_left = 0

    def __call__(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        """Run the loop; the first call compiles and captures. Carry and rows are overwritten.

        Raises:
            RuntimeError: If the steps cannot be captured, or an earlier capture failed.
        """
        index = torch.zeros(1, dtype=torch.int64, device=self._device)
        if self._captured is None:
            self._loop.prepare(index, carry, xs, chunked, constants, out)
            steps = step_count(xs, chunked)
            replays = -(-steps // max(1, MOST_OPERATIONS // self._loop.operations))
            some = partial(self._loop.advance, steps // replays)
            self._captured = CapturedFunction(some, replays=replays)
            self._steps_left = steps % replays
        index, carry, rows = self._captured(index, carry, xs, chunked, constants, out)
        if self._steps_left:
            self._loop.advance(self._steps_left, index, carry, xs, chunked, constants, rows)
        return carry, rows


class _Streams:
    """Streams of one device, each of which is lent to one graph at a time."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Stream] = []
        self._lent: set[torch.cuda.Stream] = set()

    def take(self, device: torch.device) -> torch.cuda.Stream:
        """A stream that no live graph has, unless live graphs have all of torch's streams."""
        stream = self._free.pop() if self._free else torch.cuda.Stream(device)
        for _ in range(_STREAMS_OF_TORCH):
            if stream not in self._lent:
                break
            stream = torch.cuda.Stream(device)
        self._lent.add(stream)
        return stream

    def give_back(self, stream: torch.cuda.Stream) -> None:
        """Lend the stream to the next graph, because the one that had it is destroyed."""
        self._lent.discard(stream)
        self._free.append(stream)


_streams: defaultdict[torch.device, _Streams] = defaultdict(_Streams)
