"""What Lightning's profilers need so that their evidence outlives the run.

``ProfilerGuard`` sits round ``trainer.profiler`` for one run. It writes every span into the phase
ring, keeps errors of the profiler out of the run, keeps an exception that unwinds from advancing
the schedule, and at a death takes out what was recorded. It works on the user's own object and
leaves it as it was.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import itertools
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from lightning.pytorch.profilers import PassThroughProfiler, Profiler, PyTorchProfiler
from torch.profiler import ProfilerAction

from esper_lightning.callbacks.operator_table import operator_table
from esper_lightning.callbacks.protection import Patch, Protection
from esper_lightning.callbacks.trace_export import export_trace
from esper_lightning.callbacks.window_profiler import WindowProfiler, global_session
from esper_lightning.forensics.phases import PhaseRing

__all__ = ["ProfilerGuard", "unrecorded"]

_log = logging.getLogger(__name__)
_RECORDING = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
_TABLE_BYTES = 20_000_000  # of a packed trace, about a million events: the table takes 7 s then
_WRAPPED = ("start", "stop", "describe")
_numbers = itertools.count(1)


class ProfilerGuard:
    """Round one profiler, for one run.

    Args:
        profiler: Of the Trainer.
        ring: Where spans go.
        protection: Holds signals back while a window is written.
        on_batch: Called when a training batch begins, also in a loop that a tuner runs.
        on_described: Called after the run's last act, the profiler's own report.
    """

    def __init__(
        self,
        profiler: Profiler,
        ring: PhaseRing,
        protection: Protection,
        *,
        on_batch: Callable[[], None],
        on_described: Callable[[], None],
    ) -> None:
        self.profiler = profiler
        self._ring = ring
        self._protection = protection
        self._on_batch, self._on_described = on_batch, on_described
        self._thread = threading.get_ident()
        self._outer: list[BaseException | None] = []
        self._off = False
        self._does_nothing = type(profiler) is PassThroughProfiler
        theirs = getattr(profiler, "dirpath", None)
        self._theirs = Path(theirs).absolute() if theirs else None  # before anyone changes places
        self._patches = [Patch(profiler, name, getattr(self, f"_{name}")) for name in _WRAPPED]
        self._methods = {name: getattr(type(profiler), name).__get__(profiler) for name in _WRAPPED}
        self._made_global = isinstance(profiler, PyTorchProfiler) and _make_global(profiler)

    def release(self) -> None:
        """Give the profiler its own methods back."""
        self._off = True
        for patch in self._patches:
            patch.undo()
        if self._made_global and isinstance(self.profiler, PyTorchProfiler):
            self.profiler._profiler_kwargs.pop("experimental_config", None)

    @property
    def action(self) -> str | None:
        """What the torch profiler is doing: NONE (waiting), WARMUP, RECORD, RECORD_AND_SAVE."""
        profile = self._profile
        return None if profile is None else profile.current_action.name

    @property
    def why_no_session(self) -> str:
        """Where ``action`` is ``None``."""
        if not isinstance(self.profiler, PyTorchProfiler):
            return "no PyTorchProfiler was attached"
        return "the profiler was off by then" if self._off else "the profiler was waiting"

    @property
    def has_window(self) -> bool:
        """Whether anything is being recorded."""
        profile = self._profile
        return profile is not None and profile.current_action in _RECORDING

    # What the Trainer calls.

    def _start(self, action_name: str) -> None:
        if threading.get_ident() == self._thread:
            self._outer.append(sys.exc_info()[1])
            self._ring.enter(action_name)
            if action_name == "run_training_batch":
                self._on_batch()
        if not (self._off or self._does_nothing):
            self._guarded("start", action_name)

    def _stop(self, action_name: str) -> None:
        unwinding = False
        if threading.get_ident() == self._thread and self._outer:
            unwinding = sys.exc_info()[1] is not self._outer.pop()
            if not unwinding:
                self._ring.leave(action_name)
        if self._off or self._does_nothing:
            return
        steps = isinstance(self.profiler, PyTorchProfiler) and any(
            action_name.endswith(step) for step in self.profiler.STEP_FUNCTIONS
        )
        if not (unwinding and steps):  # a step of the schedule would be one too many
            self._guarded("stop", action_name)

    def _describe(self) -> None:
        if not self._off:
            self._guarded("describe")
        self._on_described()

    def _guarded(self, method: str, *args: str) -> None:
        """Call the profiler's own method; a run does not fail because of its profiler."""
        try:
            with self._protection.held():
                self._methods[method](*args)
        except Exception as error:
            if isinstance(self.profiler, PyTorchProfiler):
                self._off = True
                lost = self.has_window or not isinstance(error, AssertionError)
                with contextlib.suppress(Exception):
                    self.abandon()
                if not lost:  # Lightning's assertion when a run ends without any window
                    return
            _log.warning("The profiler failed and is off from here on: %r", error)

    # At a death.

    @property
    def _profile(self) -> torch.profiler.profile | None:
        profile = getattr(self.profiler, "profiler", None)
        return profile if isinstance(profile, torch.profiler.profile) else None

    def finish(self, directory: Path, rank: int) -> tuple[Path, str]:
        """Close the open window and export it; the profiler is off afterwards.

        Args:
            directory: Where the trace goes if it cannot go where the user's traces go.
            rank: Of this process, for the name.

        Returns:
            The file, and the table of operators; that is empty where it would take too long.

        Raises:
            ValueError: If nothing is being recorded, or the session was lost.
            OSError: If no place takes the file.
        """
        profile = self._profile
        self._off = True
        if profile is None or profile.current_action not in _RECORDING:
            self.abandon()
            raise ValueError("no window was open")
        first_error: OSError | None = None
        self.abandon()
        assert profile.profiler is not None
        if profile.profiler.kineto_results is None:
            raise ValueError("the session had been ended by someone else")
        process = f"{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"
        name = f"crash-rank{rank}-{process}.pt.trace.json.gz"
        theirs = self._theirs
        places = [theirs] if theirs is not None and theirs not in directory.parents else []
        for place in (*places, directory):
            try:
                place.mkdir(parents=True, exist_ok=True)
                path = export_trace(profile, place / name)
                small = path.stat().st_size <= _TABLE_BYTES
                return path, operator_table(profile.profiler.kineto_results) if small else ""
            except OSError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def abandon(self) -> None:
        """Stop recording and leave the profiler as it was before its first action."""
        self._off = True
        profiler, profile = self.profiler, self._profile
        if not isinstance(profiler, PyTorchProfiler):
            return
        on_own_thread = threading.get_ident() == self._thread
        register, profiler._register = profiler._register, None
        if on_own_thread:
            for record in reversed(list(register._records.values()) if register else []):
                if getattr(record, "record", None) is not None:
                    _quietly(lambda record=record: record.__exit__(None, None, None))
            for name in reversed(list(profiler._recording_map)):
                record = profiler._recording_map[name]
                _quietly(lambda record=record: record.__exit__(None, None, None))
        profiler._recording_map.clear()
        if register is not None:
            register.__exit__(None, None, None)
        if profile is not None:
            running = profile.current_action != ProfilerAction.NONE
            profile.on_trace_ready = None
            if running and profile.profiler is not None:
                profile.profiler.use_device = None  # after a CUDA error its synchronise would raise
                _quietly(profile.stop)
            profile.current_action = profile._prev_schedule_action = ProfilerAction.NONE
        parent, profiler._parent_profiler = profiler._parent_profiler, None
        if profile is None and profiler.profiler is not None:  # emit_nvtx
            _quietly(lambda: profiler.profiler.__exit__(None, None, None))  # pyright: ignore[reportOptionalMemberAccess]
        if parent is not None:
            _quietly(lambda: parent.__exit__(None, None, None))
        profiler.profiler = None
        if profiler._schedule is not None:
            profiler._schedule.reset()

    def text(self) -> str:
        """The report of a profiler that keeps text only, such as ``SimpleProfiler``."""
        if isinstance(self.profiler, PyTorchProfiler | PassThroughProfiler):
            return ""
        for name in reversed(self._ring.open_names):
            with contextlib.suppress(Exception):
                self._methods["stop"](name)
        return self.profiler.summary()


@contextlib.contextmanager
def unrecorded() -> Generator[None]:
    """Keep what this thread does out of the window, as the work of the rescue itself."""
    switch = getattr(torch._C._autograd, "_enable_record_function", None)
    if switch is not None:
        switch(False)
    try:
        yield
    finally:
        if switch is not None:
            switch(True)


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:
        _log.debug("While closing the profiler: %r", error)


def _make_global(profiler: PyTorchProfiler) -> bool:
    """Let any thread stop the session: the watchdog too, while the main thread is stuck in C.

    Returns:
        Whether the profiler's settings were changed.
    """
    if isinstance(profiler, WindowProfiler):  # its sessions are global already
        return False
    if profiler._emit_nvtx or profiler._profiler_kwargs.get("experimental_config") is not None:
        return False
    config = global_session()
    if config is None:
        return False
    profiler._profiler_kwargs["experimental_config"] = config
    profile = profiler.profiler
    if isinstance(profile, torch.profiler.profile):  # the Trainer's first hooks have opened it
        ready, profile.on_trace_ready = profile.on_trace_ready, None
        running = profile.current_action != ProfilerAction.NONE
        if running:
            profile.stop()
        profile.experimental_config, profile.profiler = config, None
        if running:
            profile.start()
        profile.on_trace_ready = ready
    return True
