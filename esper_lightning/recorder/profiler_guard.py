"""The guard of a run's profiler: evidence of the profiler outlives the run.

``ProfilerGuard`` wraps ``trainer.profiler`` for one run. The guard writes every span into the phase
ring, prevents errors of the profiler from ending the run and an exception that unwinds from
advancing the schedule, and exports the open window at a death. The guard works on the user's own
profiler object and restores it afterwards.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import contextlib
import functools
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

from esper_lightning.callbacks.profiler_internals import (
    forget_schedule,
    profiler_settings,
    take_open_spans,
    take_parent_profiler,
    take_report_file,
)
from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.recorder.attempt import attempt
from esper_lightning.recorder.death import in_words
from esper_lightning.recorder.patch import Patch
from esper_lightning.recorder.profiling.global_session import make_global
from esper_lightning.recorder.profiling.operator_table import operator_table
from esper_lightning.recorder.profiling.trace_export import export_trace, export_whole
from esper_lightning.recorder.profiling.window_profiler import WindowProfiler
from esper_lightning.recorder.protection import Protection

__all__ = ["ProfilerGuard", "unrecorded"]

_log = logging.getLogger(__name__)
_RECORDING = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
_TABLE_BYTES = 20_000_000  # a packed trace of a million events, whose table takes 7 s
_WRAPPED = ("start", "stop", "describe")
_numbers = itertools.count(1)


class ProfilerGuard:
    """The layer between the Trainer and its profiler during one run.

    Args:
        profiler: Profiler of the Trainer.
        ring: Phase ring, which gets every span.
        protection: Protection of the run, which holds signals back while a window is written.
        on_batch: Function called when a training batch begins, also in a loop that a tuner runs.
        on_described: Function called after the run's last action, the profiler's ``describe``.
        files: Folder of this rank, for files that cannot be written into the user's folder.
    """

    def __init__(
        self,
        profiler: Profiler,
        ring: PhaseRing,
        protection: Protection,
        *,
        on_batch: Callable[[], None],
        on_described: Callable[[], None],
        files: RankLayout,
    ) -> None:
        self.profiler = profiler
        self._ring = ring
        self._protection = protection
        self._on_batch, self._on_described = on_batch, on_described
        self._files = files
        self._warned = False
        self._thread = threading.get_ident()
        self._outer: list[BaseException | None] = []
        self._off = False
        self._does_nothing = type(profiler) is PassThroughProfiler
        theirs = getattr(profiler, "dirpath", None)
        self._theirs = Path(theirs).absolute() if theirs else None  # the run directory may move it
        self._patches = [Patch(profiler, name, getattr(self, f"_{name}")) for name in _WRAPPED]
        self._methods = {name: getattr(type(profiler), name).__get__(profiler) for name in _WRAPPED}
        has_own_sessions = isinstance(profiler, WindowProfiler)  # which are global already
        self._made_global = (
            isinstance(profiler, PyTorchProfiler) and not has_own_sessions and make_global(profiler)
        )

    def release(self) -> None:
        """Restore the profiler's own methods and settings."""
        self._off = True
        for patch in self._patches:
            patch.undo()
        if self._made_global and isinstance(self.profiler, PyTorchProfiler):
            profiler_settings(self.profiler).pop("experimental_config", None)

    @property
    def action(self) -> str | None:
        """Action of the torch profiler: NONE (waiting), WARMUP, RECORD, RECORD_AND_SAVE, if any."""
        profile = self._profile
        return None if profile is None else profile.current_action.name

    @property
    def why_no_session(self) -> str:
        """Reason why nothing could be recorded, where ``action`` is ``None``."""
        if not isinstance(self.profiler, PyTorchProfiler):
            return "no PyTorchProfiler was attached"
        return "the profiler was off by then" if self._off else "the profiler was waiting"

    @property
    def has_window(self) -> bool:
        """Whether a window is being recorded."""
        profile = self._profile
        return profile is not None and profile.current_action in _RECORDING

    # Replacements of the profiler's methods, which the Trainer calls.

    def _start(self, action_name: str) -> None:
        if threading.get_ident() == self._thread:
            self._outer.append(sys.exc_info()[1])
            self._ring.enter(action_name)
            if action_name == "run_training_batch":
                self._on_batch()
        if not (self._off or self._does_nothing):
            self._call_own("start", action_name)

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
            self._call_own("stop", action_name)

    def _describe(self) -> None:
        if not self._off:
            self._call_own("describe")
        self._on_described()

    def _call_own(self, method: str, *args: str) -> None:
        """Call the profiler's own method; an error turns the profiler off, and ends no run."""
        try:
            with self._protection.held():
                self._methods[method](*args)
                self._look_after_windows()
        except Exception as error:
            self._close_output()
            is_torch = isinstance(self.profiler, PyTorchProfiler)
            # Lightning asserts that a run has a window.
            lost = self.has_window or not (is_torch and isinstance(error, AssertionError))
            self._save_what_there_is(method)
            if lost:
                _log.warning("The profiler failed and is off from here on: %r", error)

    def _close_output(self) -> None:
        """Close the file of the profiler's text, and remove the file if it is empty.

        The open file would raise again when the profiler is garbage-collected.
        """
        file = take_report_file(self.profiler)
        if file is None:
            return
        _attempt(file.close)
        with contextlib.suppress(OSError):
            path = Path(file.name)
            if path.stat().st_size == 0:
                path.unlink()

    def _save_what_there_is(self, method: str) -> None:
        """Save an open window and the table in the run directory, after the profiler failed."""
        table = ""
        with contextlib.suppress(Exception):
            if method == "describe" or not isinstance(self.profiler, PyTorchProfiler):
                table = self.profiler.summary()
            elif self.has_window:
                _, table = self.finish("window")
        with contextlib.suppress(Exception):
            self.abandon()
        if table:
            with contextlib.suppress(OSError):
                write_atomically(self._files.profile, table.encode())

    # Windows that close while the run is healthy.

    def _look_after_windows(self) -> None:
        """Patch a torch profiler that Lightning has just made: ``_hand_over`` gets its windows."""
        profile = self._profile
        ours = isinstance(self.profiler, WindowProfiler)  # which has this protection built in
        if profile is None or ours or "step" in profile.__dict__:
            return
        for name in ("step", "stop"):
            setattr(profile, name, functools.partial(self._close_window, profile, name))

    def _close_window(self, profile: torch.profiler.profile, name: str) -> None:
        """Call the profiler's own ``step`` or ``stop``, which may end a window."""
        theirs = profile.on_trace_ready
        if theirs is not None:
            profile.on_trace_ready = functools.partial(self._hand_over, theirs)
        try:
            getattr(type(profile), name)(profile)
        finally:
            profile.on_trace_ready = theirs

    def _hand_over(
        self, theirs: Callable[[torch.profiler.profile], object], profile: torch.profiler.profile
    ) -> None:
        """Let the user's function write a window; if it fails, write into the run directory."""
        profile.export_chrome_trace = functools.partial(export_whole, profile)
        try:
            theirs(profile)
        except Exception as error:
            name = f"window-{self._files.directory.name}-{_process()}.pt.trace.json.gz"
            try:
                self._files.trace.mkdir(parents=True, exist_ok=True)
                export_trace(profile, self._files.trace / name)
            except (OSError, ValueError) as problem:
                self._warn("A recorded window is lost: %s (%s)", problem, in_words(error))
            else:
                text = "The profiler cannot write its traces, which go to %s: %s"
                self._warn(text, self._files.trace, in_words(error))
        finally:
            del profile.__dict__["export_chrome_trace"]

    def _warn(self, text: str, *values: object) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(text, *values)

    # At a death.

    @property
    def _profile(self) -> torch.profiler.profile | None:
        profile = getattr(self.profiler, "profiler", None)
        return profile if isinstance(profile, torch.profiler.profile) else None

    def finish(self, name: str = "crash") -> tuple[list[Path], str]:
        """Close the open window and export it; the profiler is off afterwards.

        Args:
            name: Beginning of the name of the trace file.

        Returns:
            The trace file, or its pieces in order of time, and the table of operators, which is
            empty where the table would take too long.

        Raises:
            ValueError: If nothing is being recorded, or the session was lost.
            OSError: If neither the user's folder nor the run directory takes the file.
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
        file = f"{name}-{self._files.directory.name}-{_process()}.pt.trace.json.gz"
        theirs, ours = self._theirs, self._files.trace
        places = [theirs] if theirs is not None and theirs not in ours.parents else []
        for place in (*places, ours):
            try:
                place.mkdir(parents=True, exist_ok=True)
                paths = export_trace(profile, place / file)
                small = sum(path.stat().st_size for path in paths) <= _TABLE_BYTES
                return paths, operator_table(profile.profiler.kineto_results) if small else ""
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
        for span in take_open_spans(profiler):
            if threading.get_ident() == self._thread:  # a span belongs to its thread
                _attempt(lambda span=span: span.__exit__(None, None, None))
        if profile is not None:
            running = profile.current_action != ProfilerAction.NONE
            profile.on_trace_ready = None
            if running and profile.profiler is not None:
                profile.profiler.use_device = None  # else it raises after a CUDA error
                _attempt(profile.stop)
        parent, nvtx = take_parent_profiler(profiler), profiler.profiler
        if profile is None and nvtx is not None:
            _attempt(lambda: nvtx.__exit__(None, None, None))
        if parent is not None:
            _attempt(lambda: parent.__exit__(None, None, None))
        profiler.profiler = None
        forget_schedule(profiler, profile)

    def text(self) -> str:
        """The summary of a profiler that makes text only, such as ``SimpleProfiler``."""
        if isinstance(self.profiler, PyTorchProfiler | PassThroughProfiler):
            return ""
        for name in reversed(self._ring.open_names):
            with contextlib.suppress(Exception):
                self._methods["stop"](name)
        return self.profiler.summary()


@contextlib.contextmanager
def unrecorded() -> Generator[None]:
    """Keep this thread's operators out of the window: they are work of the rescue."""
    switch = getattr(torch._C._autograd, "_enable_record_function", None)  # pyright: ignore[reportPrivateUsage]
    if switch is not None:
        switch(False)
    try:
        yield
    finally:
        if switch is not None:
            switch(True)


def _process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"


_attempt = functools.partial(attempt, what="closing the profiler", level=logging.DEBUG)
