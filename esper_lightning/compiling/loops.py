"""Ways to run the stages of an iteration: eagerly, as native code, compiled, or as CUDA graphs.

A stage is a ``Loop`` (a scan over the leading axis of its inputs), a plain function, or a function
of rows that do not depend on each other. All are pure functions of trees of tensors, and every way
gives the same results to float32 rounding.

On a CPU, every mode but ``off`` makes native code of a stage (``native``). On CUDA, ``default``
compiles one step of a loop, and Python calls the compiled step (``stepwise``); ``max`` captures all
steps in CUDA graphs (``cuda_graph``); ``auto`` compiles nothing. Where one of these fails, the
next slower way takes over, with one warning. ``autocast_without_cache`` and ``few_cpu_threads`` are
the contexts in which stages run.
"""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch

from esper_lightning.compiling.audits import FirstRows, FirstStep, Whole
from esper_lightning.compiling.cuda_graph import CapturedFunction, CapturedLoop
from esper_lightning.compiling.native.loops import NativeFunction, NativeLoop, NativeMap
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.stages import (
    FirstThatWorks,
    NativeStage,
    log_reasons_again,
    log_slower,
)
from esper_lightning.compiling.stepwise import StepwiseLoop
from esper_lightning.compiling.tracing import Body, ChunkBody, Compiled, Tree
from esper_lightning.core.errors import require
from esper_lightning.core.tensor_trees import leaves, map_tree, rebuild

__all__ = [
    "CompileMode",
    "Loop",
    "autocast_without_cache",
    "capture_function",
    "compile_function",
    "compile_loop",
    "compile_map",
    "few_cpu_threads",
    "log_reasons_again",
    "native_or_slower",
]

CompileMode = Literal["off", "auto", "default", "max"]
Loop = Callable[..., tuple[Tree, Tree]]
"""A loop: ``(carry, xs, chunked, constants, out=None) -> (carry, rows)``."""

_T = TypeVar("_T")
_SAMPLES_WORTH_A_THREAD = 2048


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
    that the loop returns. Rows may be overwritten by the next call.

    Args:
        name: Name of the loop, for messages.
        body: Pure function of one step.
        chunk_body: Pure function of a chunk of ``chunked[t]``. Its results are summed over the
            chunks of a step, and the body gets the sums. A step may thus be cut into chunks that
            fit a cache. ``None`` where the body needs no such sums.
        mode: Compile mode of the loop.
        device: Device of all tensors.
    """
    eager = _eager_loop(body, chunk_body)
    if _is_native(mode, device):
        return NativeStage(name, lambda: NativeLoop(body, chunk_body), eager, FirstStep())
    if not _is_compiled(mode, device):
        return eager
    stepwise = StepwiseLoop(body, chunk_body, device)
    captured = [CapturedLoop(stepwise, device)] if mode == "max" else []
    return FirstThatWorks(name, f"compile={mode!r}", [*captured, stepwise, eager])


def compile_function(
    name: str, function: Callable[..., Tree], *, mode: CompileMode, device: torch.device
) -> Callable[..., Tree]:
    """A pure function of trees of tensors, compiled as ``mode`` says.

    With ``max`` on CUDA the compiled function is captured as a CUDA graph. What a compiled function
    returns may be overwritten by its next call.

    Args:
        name: Name of the function, for messages.
        function: Pure function.
        mode: Compile mode of the function.
        device: Device of all tensors.
    """
    return _compiled(name, function, NativeFunction, Whole(), mode=mode, device=device)


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
    return _compiled(name, function, NativeMap, FirstRows(), mode=mode, device=device)


def capture_function(
    name: str, function: Callable[..., Tree], *, device: torch.device
) -> Callable[..., Tree]:
    """A function of trees of tensors that is replayed as a CUDA graph on a GPU.

    On other devices the function runs as it is. All of its operations are in one graph, whatever
    their number. The function may change its arguments, no two of which may share memory, and must
    have no other effect. Each call overwrites the arguments of the first call and the results of
    every earlier call.

    Args:
        name: Name of the function, for messages.
        function: Function to capture.
        device: Device of all tensors.
    """
    if device.type != "cuda":
        return function
    return FirstThatWorks(name, "A CUDA graph", [CapturedFunction(function), function])


def native_or_slower(name: str, make: Callable[[], _T], *, required: str | None) -> _T | None:
    """What ``make`` makes of native code, or ``None`` where the slower way must do.

    The reason is logged as a warning, unless the user has switched compilers off.

    Args:
        name: Name of the function, for messages.
        make: Function that raises ``UnsupportedError`` where code cannot be compiled.
        required: Name of the setting that is True because there must be native code.

    Raises:
        ValueError: If native code is required and cannot be compiled.
    """
    if required is None and _is_disabled():
        return None
    try:
        return make()
    except UnsupportedError as error:
        rule = "be None or False where no native code can be compiled"
        require(required is None, required or "", rule, True, f"Reason: {error}.")
        log_slower("Native code", name, error)
    return None


def autocast_without_cache(device: torch.device) -> AbstractContextManager[object]:
    """The autocast that is in force, without its cache of converted weights.

    The cache lives as long as Lightning's autocast context, which is a whole iteration. With the
    cache, every minibatch after the first gradient step would still compute with the old weights.

    Args:
        device: Device of the module.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    dtype = torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


@contextmanager
def few_cpu_threads(samples: int) -> Generator[None]:
    """A context with one CPU thread, where tensors have too few rows for a second thread to help.

    Threads of an OpenMP team wait for each other by spinning: beside another busy process, 64
    environments ran tens of times slower with two threads than with one (``docs/decisions/0008``).

    Args:
        samples: Number of rows of the largest tensors, which are those of a minibatch.
    """
    threads = torch.get_num_threads()
    if samples >= _SAMPLES_WORTH_A_THREAD or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_native(mode: CompileMode, device: torch.device) -> bool:
    return device.type == "cpu" and mode != "off" and not _is_disabled()


def _is_compiled(mode: CompileMode, device: torch.device) -> bool:
    return device.type == "cuda" and mode in ("default", "max")


def _is_disabled() -> bool:
    """Whether the user has switched compilers off, as for ``torch.compile``."""
    return os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1"


def _compiled(
    name: str,
    function: Callable[..., Tree],
    native: type[NativeFunction] | type[NativeMap],
    sample: Whole,
    *,
    mode: CompileMode,
    device: torch.device,
) -> Callable[..., Tree]:
    """A function with all ways to run it, from the fastest to the eager one."""
    if _is_native(mode, device):
        return NativeStage(name, lambda: native(function), function, sample)
    if not _is_compiled(mode, device):
        return function
    compiled = Compiled(function)
    captured = [CapturedFunction(compiled)] if mode == "max" else []
    return FirstThatWorks(name, f"compile={mode!r}", [*captured, compiled, function])


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
