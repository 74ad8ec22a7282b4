"""The faults themselves, and what the failing process writes down just before them.

Used by ``program``, inside the process that is to die; no pytest here.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

LOOP_S = 60.0  # longer than any case may take


def note(directory: Path, name: str, content: dict[str, Any]) -> None:
    """A side file of the program's own, whole or not there."""
    temporary = directory / f"{name}.{os.getpid()}.new"
    temporary.write_text(json.dumps(content))
    temporary.replace(directory / f"{name}.json")


def torch_action(profiler: object) -> str | None:
    """What the torch profiler within a Lightning profiler is doing."""
    action = getattr(getattr(profiler, "profiler", None), "current_action", None)
    return None if action is None else action.name


class Fault:
    """What a configuration asks for, set off by ``strike``."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.kind: str = config["fault"]
        self.block: str = config["block"]
        self.block_s: float = config["options"].get("block_s", LOOP_S)
        self.directory = Path(config["side"])

    def strike(self, profiler: object, rank: int) -> None:
        """Run an operator that the trace must show, write a note, fail."""
        torch.special.erfcx(torch.ones(4))
        window = getattr(profiler, "profiler", None) is not None
        content = {"action": torch_action(profiler), "open": window, "pid": os.getpid()}
        note(self.directory, f"strike-{rank}", content | {"time_s": time.time()})
        limit, _, kind = self.kind.rpartition("+")
        if limit:  # from here on no file may be longer, as on a full disk
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), hard))
        self._fail(kind)

    def _fail(self, kind: str) -> None:
        if kind in _ERRORS:
            raise _ERRORS[kind]
        if kind in _ACTIONS:
            _ACTIONS[kind]()
        elif kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, kind))
        if kind != "pause_after":
            block(self.block, self.block_s)


def _recurse(depth: int = 0) -> int:
    return _recurse(depth + 1) + 1


def _abort_in_thread() -> None:
    thread = threading.Thread(target=ctypes.CDLL(None).abort)
    thread.start()
    thread.join()


_ERRORS: dict[str, BaseException] = {
    "RuntimeError": RuntimeError("injected"),
    "ValueError": ValueError("loss is nan"),
    "OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory. injected"),
    "MemoryError": MemoryError("injected"),
    "KeyboardInterrupt": KeyboardInterrupt(),
}
_ACTIONS: dict[str, Any] = {
    "RecursionError": _recurse,
    "allocation": lambda: torch.empty(1 << 50),
    "exit0": lambda: sys.exit(0),
    "exit3": lambda: sys.exit(3),
    "_exit0": lambda: os._exit(0),
    "_exit3": lambda: os._exit(3),
    "abort": os.abort,
    "thread_abort": _abort_in_thread,
    "segfault": lambda: ctypes.string_at(0),
}


def block(how: str, seconds: float) -> None:
    """Keep the main thread busy: in ``python``, in ``c``, or in ``c_gil``, which holds the GIL."""
    end = time.time() + seconds
    if how == "python":
        while time.time() < end:
            torch.ones(8).sin()
    elif how == "sleep":
        time.sleep(seconds)
    elif how in ("c", "c_gil"):
        # A mutex that is locked already: unlike sleep(3), no signal ends the wait.
        libc = (ctypes.CDLL if how == "c" else ctypes.PyDLL)(None)
        mutex = ctypes.create_string_buffer(64)
        until = (ctypes.c_long * 2)(int(end), 0)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_timedlock(mutex, until)
