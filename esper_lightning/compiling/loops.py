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

import logging
import os
import threading
import warnings
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch

from esper_lightning.compiling.audits import Audit, FirstRows, FirstStep, Whole
from esper_lightning.compiling.cuda_graph import CapturedFunction, CapturedLoop
from esper_lightning.compiling.holders import ImpureError
from esper_lightning.compiling.native.loops import NativeFunction, NativeLoop, NativeMap
from esper_lightning.compiling.native.program import IndexOutsideError
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.other_threads import call_unrecorded
from esper_lightning.compiling.reads import Reads
from esper_lightning.compiling.stepwise import StepwiseLoop
from esper_lightning.compiling.tracing import Body, ChunkBody, Compiled, Tree
from esper_lightning.core.errors import require
from esper_lightning.core.tensor_trees import kind, leaves, map_tree, rebuild

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
_log = logging.getLogger(__name__)
_REASONS_LOGGED: set[str] = set()
_SAMPLES_WORTH_A_THREAD = 2048
_TRACING = threading.RLock()  # torch traces in one thread at a time


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
        return _Native(name, lambda: NativeLoop(body, chunk_body), eager, FirstStep())
    if not _is_compiled(mode, device):
        return eager
    stepwise = StepwiseLoop(body, chunk_body, device)
    captured = [CapturedLoop(stepwise, device)] if mode == "max" else []
    return _FirstThatWorks(name, f"compile={mode!r}", [*captured, stepwise, eager])


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

    On other devices the function runs as it is. The function may change its arguments, no two of
    which may share memory, and must have no other effect. Each call overwrites the arguments of the
    first call and the results of every earlier call.

    Args:
        name: Name of the function, for messages.
        function: Function to capture.
        device: Device of all tensors.
    """
    if device.type != "cuda":
        return function
    return _FirstThatWorks(name, "A CUDA graph", [CapturedFunction(function), function])


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
        _tell("Native code", name, error)
    return None


def log_reasons_again() -> None:
    """Allow every reason for a slower way to be logged again, as at the start of a run.

    Each run logs each reason as a warning once.
    """
    _REASONS_LOGGED.clear()


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
        return _Native(name, lambda: native(function), function, sample)
    if not _is_compiled(mode, device):
        return function
    compiled = Compiled(function)
    captured = [CapturedFunction(compiled)] if mode == "max" else []
    return _FirstThatWorks(name, f"compile={mode!r}", [*captured, compiled, function])


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


def _tell(how: str, name: str, error: Exception) -> None:
    """Log why a function takes a slower way: each reason once in a run."""
    cause = getattr(error, "inner_exception", error)  # from a compiler's backend
    reason = f"{type(cause).__name__}: {cause}".strip().splitlines()[0][:300]
    if isinstance(error, UnsupportedError | ImpureError):
        reason = str(error)
    level = logging.DEBUG if reason in _REASONS_LOGGED else logging.WARNING
    _REASONS_LOGGED.add(reason)
    _log.log(level, "%s does not work for the %s, which takes a slower way: %s", how, name, reason)
    _log.debug("The whole error:", exc_info=error)


class _Native:
    """A function as native code, a program for each kind of arguments.

    So the results for some arguments never depend on what was called before. Where there can be no
    program, the function runs eagerly; for good once something has changed that a program read of
    a user's objects, or once results differ from those of the function.

    Args:
        name: Name of the function, for messages.
        program: Function that makes a native function, which compiles at its first call.
        eager: The function itself.
        sample: Part of a call that is compared now and then.
    """

    def __init__(
        self,
        name: str,
        program: Callable[[], NativeFunction | NativeMap | NativeLoop],
        eager: Callable[..., Tree],
        sample: Whole,
    ) -> None:
        self._name, self._program, self._eager = name, program, eager
        self._audit = Audit(sample)
        self._run: dict[Hashable, Callable[..., Tree]] = {}
        self._reads: list[Reads] = []
        self._is_native = True

    def __call__(self, *args: Tree) -> Tree:
        if self._is_native and (changed := self._changed()) is not None:
            self._give_up(ImpureError(f"an attribute that changed: {changed}"))
        if not self._is_native or any(isinstance(arg, list) for arg in args):
            return self._eager(*args)  # lists are minibatches of unequal size
        kind_of_args = kind(args)
        run = self._run.get(kind_of_args)
        if run is not None:
            try:
                return self._call(run, args)
            except ImpureError as error:
                self._give_up(error)
                return self._eager(*args)
        program = self._program()
        try:
            call_unrecorded(_TRACING, lambda: program.prepare(*args))
            result = program(*args)
            self._run[kind_of_args] = program
            self._reads += program.reads
            return result
        except IndexOutsideError:
            self._run[kind_of_args] = program
            raise
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of the function, of torch's tracer, or of the compiler
            self._run[kind_of_args] = self._eager
            _tell("Native code", self._name, error)
        return self._eager(*args)

    def _call(self, run: Callable[..., Tree], args: tuple[Tree, ...]) -> Tree:
        """Call a program; ``ImpureError`` if it no longer does what the function does."""
        if run is self._eager or not self._audit.is_due():
            return run(*args)
        result, differs = self._audit.call(run, self._eager, args)
        if differs is not None:
            raise ImpureError(f"results that are no longer those of the function: {differs}")
        return result

    def _give_up(self, reason: ImpureError) -> None:
        """Run the function eagerly for good."""
        self._is_native = False
        _tell("Native code", self._name, reason)

    def _changed(self) -> str | None:
        """Name of something that a program read and that has changed since."""
        return next((name for reads in self._reads if (name := reads.changed())), None)


class _FirstThatWorks:
    """Ways to run the same function, of which the fastest that works is used.

    Compiled ways serve only the shapes of the first call. Calls with other shapes, such as a
    shorter last rollout, are not worth a compilation and run eagerly.

    Args:
        name: Name of the function, for messages.
        how: What the fastest way is, for messages.
        ways: Ways to run the function, from the fastest to the eager one.
    """

    def __init__(self, name: str, how: str, ways: Sequence[Callable[..., Tree]]) -> None:
        self._name, self._how, self._ways = name, how, list(ways)
        self._kind: Hashable = None

    def __call__(self, *args: Tree) -> Tree:
        if len(self._ways) == 1:
            return self._ways[0](*args)
        if any(isinstance(arg, list) for arg in args):  # minibatches of unequal size
            return self._ways[-1](*args)
        kind_of_args = kind(args)
        if kind_of_args == self._kind:
            return self._ways[0](*args)
        if self._kind is not None:
            _log.debug("The %s has other shapes than at first and runs eagerly.", self._name)
            return self._ways[-1](*args)
        self._kind = kind_of_args
        while len(self._ways) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", module="torch")  # from compilers
                    return self._ways[0](*args)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # compilers raise errors of every kind
                del self._ways[0]
                _tell(self._how, self._name, error)
        return self._ways[0](*args)
