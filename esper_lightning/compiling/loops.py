"""Ways to run the stages of an iteration: eagerly, as native code, compiled, or as CUDA graphs.

A stage is a ``Loop`` (a scan over the leading axis of its inputs), a plain function, or a function
of rows that do not depend on each other. All are pure functions of trees of tensors, and every way
gives the same results to float32 rounding.

With ``auto``, a stage becomes native code on a CPU (``native``), and runs eagerly elsewhere.
``default`` compiles one step of a loop, and Python calls the compiled step (``stepwise``). ``max``
compiles the loop itself (``scan``, on a CPU) or captures all of its steps in a CUDA graph
(``cuda_graph``). Where one of these fails, the next slower way takes over, with one warning.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from esper_lightning.compiling.cuda_graph import CapturedFunction
from esper_lightning.compiling.native.loops import NativeFunction, NativeLoop, NativeMap
from esper_lightning.compiling.scan import ScanLoop, ScanMap
from esper_lightning.compiling.stepwise import StepwiseLoop
from esper_lightning.compiling.tracing import Body, ChunkBody, Compiled, Tree
from esper_lightning.core.tensor_trees import leaves, map_tree, rebuild

__all__ = [
    "CompileMode",
    "Loop",
    "capture_function",
    "compile_function",
    "compile_loop",
    "compile_map",
    "tell_reasons_again",
]

CompileMode = Literal["off", "auto", "default", "max"]
Loop = Callable[..., tuple[Tree, Tree]]
"""A loop: ``(carry, xs, chunked, constants, out=None) -> (carry, rows)``."""

_log = logging.getLogger(__name__)
_REASONS_LOGGED: set[str] = set()


def compile_loop(
    name: str,
    body: Body,
    chunk_body: ChunkBody | None = None,
    *,
    mode: CompileMode,
    device: torch.device,
) -> Loop:
    """A loop ``for t in range(T)`` over ``carry, row = body(carry, xs[t], constants)``.

    The returned loop takes ``(carry, xs, chunked, constants, out)`` and returns the last carry and
    all rows, stacked. It may change ``carry`` in place, so the caller must continue with the carry
    that the loop returns.

    Args:
        name: Name of the loop, for messages.
        body: Pure function of one step.
        chunk_body: Pure function of a chunk of ``chunked[t]``. Its results are summed over the
            chunks of a step, and the body gets the sums. A step may thus be cut into chunks that
            fit a cache. ``None`` where the body needs no such sums.
        mode: Compile mode of the loop.
        device: Device of all tensors.
    """
    ways: list[Callable[..., Tree]] = [_eager_loop(body, chunk_body)]
    if _is_native(mode, device):
        ways.insert(0, NativeLoop(body, chunk_body))
    elif mode in ("default", "max"):
        stepwise = StepwiseLoop(body, chunk_body, device)
        ways.insert(0, stepwise)
        if mode == "max":
            on_cuda = device.type == "cuda"
            ways.insert(
                0, CapturedFunction(stepwise) if on_cuda else ScanLoop(body, chunk_body, device)
            )
    return _FirstThatWorks(name, mode, ways)


def compile_function(
    name: str, function: Callable[..., Tree], *, mode: CompileMode, device: torch.device
) -> Callable[..., Tree]:
    """A pure function of trees of tensors, compiled as ``mode`` says.

    With ``max`` on CUDA the compiled function is captured as a CUDA graph.

    Args:
        name: Name of the function, for messages.
        function: Pure function.
        mode: Compile mode of the function.
        device: Device of all tensors.
    """
    native = NativeFunction(function) if _is_native(mode, device) else None
    return _FirstThatWorks(name, mode, _ways(function, native, mode=mode, device=device))


def compile_map(
    name: str, function: Callable[[Tree, Tree], Tree], *, mode: CompileMode, device: torch.device
) -> Callable[[Tree, Tree], Tree]:
    """A pure function ``(rows, constants) -> rows`` whose rows do not depend on each other.

    Native code computes a few rows at a time, whose intermediate results stay in the caches.

    Args:
        name: Name of the function, for messages.
        function: Pure function, of any number of rows.
        mode: Compile mode of the function.
        device: Device of all tensors.
    """
    native = NativeMap(function) if _is_native(mode, device) else None
    ways = _ways(function, native, mode=mode, device=device)
    if mode == "max" and device.type == "cpu":
        ways.insert(0, ScanMap(function, device))
    return _FirstThatWorks(name, mode, ways)


def capture_function(
    name: str, function: Callable[..., Tree], *, device: torch.device
) -> Callable[..., Tree]:
    """A function of trees of tensors that is replayed as a CUDA graph on a GPU.

    On other devices the function runs as it is. The function may change its arguments, no two of
    which may share memory, and must have no other effect. Each call overwrites the arguments of the
    first call and the results of every earlier call.

    Args:
        name: Name of the function, for messages.
        function: Function to capture.
        device: Device of all tensors.
    """
    ways: list[Callable[..., Tree]] = [function]
    if device.type == "cuda":
        ways.insert(0, CapturedFunction(function))
    return _FirstThatWorks(name, None, ways)


def tell_reasons_again() -> None:
    """Allow every reason for a slower way to be logged again, as at the start of a run.

    Each run logs each reason as a warning once.
    """
    _REASONS_LOGGED.clear()


def _is_native(mode: CompileMode, device: torch.device) -> bool:
    return device.type == "cpu" and mode == "auto"


def _ways(
    function: Callable[..., Tree],
    native: Callable[..., Tree] | None,
    *,
    mode: CompileMode,
    device: torch.device,
) -> list[Callable[..., Tree]]:
    """Ways to run a function, from the fastest to the eager one."""
    if native is not None:
        return [native, function]
    if mode not in ("default", "max"):
        return [function]
    compiled = Compiled(function, device)
    if mode == "max" and device.type == "cuda":
        return [CapturedFunction(compiled), compiled, function]
    return [compiled, function]


def _stack(rows: Sequence[Tree]) -> Tree:
    columns = zip(*(leaves(row) for row in rows), strict=True)
    return rebuild(rows[0], [torch.stack(column) for column in columns])


def _eager_loop(body: Body, chunk_body: ChunkBody | None) -> Loop:
    def run(
        carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        rows: list[Tree] = []
        for t in range(leaves((xs, chunked))[0].shape[0] if chunk_body is None else len(chunked)):
            x = map_tree(lambda value, t=t: value[t], xs)
            if chunk_body is not None:
                x = (chunk_body(carry, chunked[t], constants), x)
            carry, row = body(carry, x, constants)
            if out is None:
                rows.append(row)
            else:
                for storage, value in zip(leaves(out), leaves(row), strict=True):
                    storage[t] = value
        return carry, _stack(rows) if out is None else out

    return run


class _FirstThatWorks:
    """Ways to run the same function, of which the fastest that works is used.

    Compiled ways serve only the shapes of the first call. Calls with other shapes, such as a
    shorter last rollout, are not worth a compilation and run eagerly.

    Args:
        name: Name of the function, for messages.
        mode: Compile mode, for messages; ``None`` for a function that is only captured.
        ways: Ways to run the function, from the fastest to the eager one.
    """

    def __init__(
        self, name: str, mode: CompileMode | None, ways: Sequence[Callable[..., Tree]]
    ) -> None:
        self._name = name
        self._how = "A CUDA graph" if mode is None else f"compile={mode!r}"
        self._ways = list(ways)
        self._kinds: list[tuple[torch.Size, torch.dtype]] | None = None

    def __call__(self, *args: Tree) -> Tree:
        if len(self._ways) == 1:
            return self._ways[0](*args)
        if any(isinstance(arg, list) for arg in args):  # minibatches of unequal size
            return self._ways[-1](*args)
        kinds = [(leaf.shape, leaf.dtype) for leaf in leaves(args)]
        if kinds == self._kinds:
            return self._ways[0](*args)
        if self._kinds is not None:
            _log.debug("The %s has other shapes than at first and runs eagerly.", self._name)
            return self._ways[-1](*args)
        self._kinds = kinds
        while len(self._ways) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", module="torch")  # from compilers
                    return self._ways[0](*args)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # compilers raise errors of every kind
                del self._ways[0]
                cause = getattr(error, "inner_exception", error)  # from a compiler's backend
                reason = f"{type(cause).__name__}: {cause}".strip().splitlines()[0][:300]
                text = "%s does not work for the %s, which takes a slower way: %s"
                level = logging.DEBUG if reason in _REASONS_LOGGED else logging.WARNING
                _REASONS_LOGGED.add(reason)
                _log.log(level, text, self._how, self._name, reason)
                _log.debug("The whole error:", exc_info=error)
        return self._ways[0](*args)
