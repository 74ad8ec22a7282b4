"""Threads beside the present one: those of users, and one of our own for translations.

Threads of users may change what a function holds while it is called or traced.
"""

import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, copy_context
from types import FrameType
from typing import Any, TypeVar

import torch

__all__ = ["call_unrecorded", "other_threads_run", "records_calls"]

# Their threads touch nothing of a user's: those of loggers, of progress bars, and of test runners.
_KNOWN = {"esper_lightning", "lightning", "torch", "tensorboard", "tqdm", "execnet"}
_KNOWN_WHERE_IDLE = {"fsspecIO"}  # by name: between two transfers such a thread is within asyncio
_LOOK_EVERY_S = 0.1
_UNTIL_IT_ENDS_S = 10.0  # for a thread that was interrupted

_T = TypeVar("_T")
_caller: ContextVar[int | None] = ContextVar("_caller", default=None)


def other_threads_run() -> bool:
    """Whether threads run beside the present one that may be a user's.

    A thread that waits for the present one, in ``call_unrecorded``, does not run.
    """
    idle = (threading.get_ident(), _caller.get())
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage] - it is documented
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    others = ((names.get(number), frame) for number, frame in frames.items() if number not in idle)
    return any(_may_be_users(name, frame) for name, frame in others)


def _may_be_users(name: str | None, frame: FrameType) -> bool:
    """Whether the outermost function of a thread that is not Python's own is a user's.

    A thread that waits for work within Python's own functions may get work of a user.
    """
    outermost, place = "", frame
    while place is not None:
        package = str(place.f_globals.get("__name__")).split(".")[0]
        outermost = outermost if package in sys.stdlib_module_names else package
        place = place.f_back
    return outermost not in _KNOWN and not (outermost == "" and name in _KNOWN_WHERE_IDLE)


def records_calls() -> bool:
    """Whether a profiler of torch records every call in Python of this thread.

    Unlike the others, it can neither pause nor be set again.
    """
    profile: Any = sys.getprofile()
    return not (profile is None or callable(profile) or hasattr(profile, "disable"))


def call_unrecorded(lock: AbstractContextManager[object], function: Callable[[], _T]) -> _T:
    """Call a function so that no profiler of torch records its calls in Python.

    A translation to native code is millions of calls, and a profiler that records stacks takes a
    kilobyte for each. It records the threads that live when it starts: beside it, the function is
    called in a new thread, for which this one waits. Where modes of torch (``TorchFunctionMode``)
    are in force, which belong to a thread, the function is called in this one.

    Args:
        lock: Lock that is held meanwhile by the thread in which the function is called.
        function: Function without arguments.
    """
    if not records_calls() or _has_modes():
        with lock:
            return function()
    context, modes, done = copy_context(), _modes(), threading.Event()
    context.run(_caller.set, threading.get_ident())
    results, errors = list[_T](), list[BaseException]()

    def call() -> None:
        try:
            with lock, modes[0], modes[1], modes[2]:
                results.append(context.run(function))
        except BaseException as error:  # it is raised in the thread that waits
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=call, name="esper-translation", daemon=True)
    try:
        thread.start()
        while not done.wait(_LOOK_EVERY_S):  # a signal that another thread gets wakes nobody
            pass
    except BaseException:  # of a signal's handler, which Python calls in the main thread
        _interrupt(thread)
        done.wait(_UNTIL_IT_ENDS_S)
        raise
    thread.join()
    if errors:
        raise errors.pop()
    return results.pop()


def _has_modes() -> bool:
    """Whether this thread has modes that intercept operations."""
    in_c: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    return in_c._len_torch_function_stack() > 0 or in_c._len_torch_dispatch_stack() > 0


def _modes() -> tuple[Any, ...]:
    """Contexts in which another thread computes as this one does, on a CPU."""
    kind = "cpu"
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    cached = torch.is_autocast_cache_enabled()
    return (
        torch.inference_mode(torch.is_inference_mode_enabled()),
        torch.set_grad_enabled(torch.is_grad_enabled()),
        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached),
    )


def _interrupt(thread: threading.Thread) -> None:
    """Raise ``KeyboardInterrupt`` in a thread, so that it leaves everything as it was."""
    number, error = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, error)
