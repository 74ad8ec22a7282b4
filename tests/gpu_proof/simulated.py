"""CUDA graphs on a CPU: captured operations run again, on memory that held garbage in between.

``SimulatedCuda`` stands in for streams and graphs of ``torch.cuda``. As on a GPU, a capture
computes nothing, and a replay reads and writes the addresses of the capture. A replay may use the
memory of its results for other things first, so that memory is filled with garbage before it. What
no capture allows raises an error: reading a number on the host, random numbers, and an operation
that the stream of the capture has never run, because libraries and kernels initialise themselves at
their first use (handles and workspaces of cuBLAS belong to a stream).

Streams do not run side by side. Yet each notes which others it has waited for, and work on a stream
is an error where the stream that was the current one before has done work that it never waited for.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper_lightning.compiling import cuda_graph, loops, stepwise, tracing
from esper_lightning.compiling.cuda_graph import CapturedFunction
from esper_lightning.envs.morphogenesis import env as growth

__all__ = ["SimulatedCuda", "SimulatedGraph"]

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")
_POISON = {torch.bool: True, torch.int64: -(2**40), torch.uint8: 173}


class SimulatedGraph:
    """A graph: operations with the tensors that they had when they were captured.

    Attributes:
        calls: Operations, in order; each with arguments, and with results in new memory.
        stream: Stream of the capture; ``None`` before.
        size: Number of operations that change memory.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []
        self.stream: SimulatedStream | None = None
        self.pool: list[Tensor] = []

    @property
    def size(self) -> int:
        return len(self.calls)

    def poison(self) -> None:
        for tensor in self.pool:
            value = float("nan") if tensor.is_floating_point() else _POISON.get(tensor.dtype, -77)
            tensor.fill_(value)

    @torch.no_grad()
    def replay(self) -> None:
        self.poison()
        for function, args, kwargs, results in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for static, value in zip(results, again, strict=True):
                if static is not None:
                    static.copy_(value)


class SimulatedStream:
    """One of the 32 streams of a device, which torch hands out in turn.

    Attributes:
        number: Number of the stream.
        waits: Whether a stream waits for all work of another so far, by both of their numbers.
        ran: Operations that have run outside of captures, each with the number of its stream.
    """

    _numbers = itertools.count()
    waits: set[tuple[int, int]] = set()  # noqa: RUF012
    ran: set[tuple[int, Any]] = set()  # noqa: RUF012

    def __init__(self, device: torch.device | None = None) -> None:
        self.number = next(self._numbers) % 32

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimulatedStream) and self.number == other.number

    def __hash__(self) -> int:
        return self.number

    def wait_stream(self, other: "SimulatedStream") -> None:
        self.waits.add((self.number, other.number))

    def follow(self, other: "SimulatedStream") -> None:
        """Work on this stream, on what the other has made."""
        if self != other and (self.number, other.number) not in self.waits:
            raise AssertionError("A stream works on tensors of a stream that it did not wait for")

    def work(self) -> None:
        """There is new work, which no stream has waited for."""
        self.waits.difference_update([pair for pair in self.waits if pair[1] == self.number])


class SimulatedGenerator:
    """The default generator of a device, which a capture that fails leaves as if it went on."""

    def __init__(self) -> None:
        self.capturing, self.now = False, torch.Generator().manual_seed(7)

    def get_state(self) -> Tensor:
        return self.now.get_state()

    def graphsafe_set_state(self, other: torch.Generator) -> None:
        self.capturing, self.now = False, other


class _Runs(TorchDispatchMode):
    """Notes the operations that run on a stream."""

    def __init__(self, stream: SimulatedStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._stream.ran.add((self._stream.number, func))
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: SimulatedGraph) -> None:
        super().__init__()
        assert graph.stream is not None
        self._stream = graph.stream
        self._graph = graph
        self._own: set[int] = set()  # storages of the graph
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # what the capture must not change

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        masks = name == "index" and any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])
        if name in _READS or masks or "rand" in name or name.endswith("normal_"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if (self._stream.number, func) not in self._stream.ran:
            raise RuntimeError(f"initialisation not permitted when stream is capturing: {name}")
        mutable = func._schema.is_mutable
        if mutable:
            self._save(func, args, kwargs)
        results = func(*args, **kwargs)
        memory = {_memory(tensor) for tensor in given}
        fresh: list[Tensor | None] = []
        for result in tree_leaves(results):
            is_new = isinstance(result, Tensor) and _memory(result) not in memory
            fresh.append(result if is_new else None)
            if is_new:
                self._own.add(_memory(result))
                self._graph.pool.append(result)
        if mutable or any(result is not None for result in fresh):  # else it is a view
            self._graph.calls.append((func, args, kwargs, fresh))
        return results

    def _save(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                if not isinstance(tensor, Tensor) or _memory(tensor) in self._own:
                    continue
                if _memory(tensor) not in self._before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    self._before[_memory(tensor)] = whole, whole.clone()

    def undo(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)
        self._graph.poison()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class SimulatedCuda:
    """What ``cuda_graph`` uses of ``torch.cuda``, on a CPU.

    Attributes:
        graphs: Graphs in the order of their captures.
        current: Current stream.
        devices: Devices that were made the current one.
        generator: Default generator.
    """

    def __init__(self) -> None:
        self.graphs: list[SimulatedGraph] = []
        SimulatedStream.waits.clear()
        SimulatedStream.ran.clear()
        self.current = SimulatedStream()
        self.devices: list[torch.device] = []
        self.generator = SimulatedGenerator()

    def install(self, monkeypatch: Any) -> None:
        """Have the modes ``default`` and ``max`` run on a CPU as on CUDA, without a compiler."""
        for name, value in {
            "Stream": SimulatedStream,
            "CUDAGraph": SimulatedGraph,
            "current_stream": lambda device=None: self.current,
            "default_generators": {None: self.generator},
            "set_stream": self._set_stream,
            "stream": self._stream,
            "device": self._device,
            "graph": lambda graph, **how: _Capture(self, graph, **how),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(cuda_graph, "_failed", [])
        monkeypatch.setattr(cuda_graph, "_streams", type(cuda_graph._streams)(cuda_graph._Streams))
        compiled = ("default", "max")
        monkeypatch.setattr(loops, "_is_native", lambda mode, device: False)
        monkeypatch.setattr(loops, "_is_compiled", lambda mode, device: mode in compiled)
        for module in (stepwise, tracing):
            monkeypatch.setattr(module, "compile_graph", lambda graph: graph)
        monkeypatch.setattr(growth, "capture_function", lambda _, f, *, device: CapturedFunction(f))

    def _set_stream(self, stream: SimulatedStream) -> None:
        self.current = stream

    @contextlib.contextmanager
    def _stream(self, stream: SimulatedStream) -> Iterator[None]:
        before, self.current = self.current, stream
        stream.follow(before)
        try:
            with _Runs(stream):
                yield
        finally:
            stream.work()
            before.work()  # whatever comes next
            self.current = before

    @contextlib.contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        yield


class _Capture:
    """``torch.cuda.graph``, which does not restore the stream where a capture cannot be ended."""

    def __init__(
        self,
        cuda: SimulatedCuda,
        graph: SimulatedGraph,
        *,
        stream: SimulatedStream,
        capture_error_mode: str,
    ) -> None:
        graph.stream = stream
        self._cuda, self._graph, self._recorder = cuda, graph, _Recorder(graph)
        # Loggers and watchdogs use CUDA in other threads, which only this mode lets them do while
        # it forbids it to the thread of the capture.
        assert capture_error_mode == "thread_local", "a capture that other threads end"

    def __enter__(self) -> None:
        self._cuda.current.follow(self._graph.stream)  # the warm-up has ended
        self._before, self._cuda.current = self._cuda.current, self._graph.stream
        self._cuda.generator.capturing = True
        self._recorder.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._recorder.__exit__(*error)
        self._recorder.undo()
        if error[0] is not None:
            raise RuntimeError("capture_end: operation failed due to a previous error")
        self._cuda.generator.capturing = False
        self._cuda.current = self._before
        self._cuda.graphs.append(self._graph)
