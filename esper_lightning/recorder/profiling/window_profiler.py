"""Lightning's ``PyTorchProfiler`` with a schedule that works as its arguments state.

Lightning's own class records one cycle whatever ``repeat`` is, never the first step, loses a window
if a validation interrupts it, and costs up to a fifth of the run while it waits.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import itertools
import logging
import os
import socket
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.profilers import PyTorchProfiler
from torch.profiler import ProfilerAction, record_function
from typing_extensions import override

from esper_lightning.callbacks.profiler_internals import profiler_settings
from esper_lightning.core.errors import at_least, check_arguments, require_name
from esper_lightning.core.paths import expand_home
from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.recorder.profiling.global_session import global_session
from esper_lightning.recorder.profiling.operator_table import operator_table
from esper_lightning.recorder.profiling.trace_export import export_trace

__all__ = ["WindowProfiler"]

_log = logging.getLogger(__name__)
_numbers = itertools.count(1)  # so that a second run in this process replaces no file
_OTHER_STEPS = ("validation_step", "test_step", "predict_step")


class WindowProfiler(PyTorchProfiler):
    """Record windows of whole training steps, each into a gzipped Chrome trace of its own.

    A cycle consists of ``wait`` steps that are not recorded, and cost little; ``warmup`` steps, the
    last of which is recorded, counted and discarded; and ``active`` steps that are recorded. Only
    training steps count; work between two steps, as in a validation, belongs to the window. A
    window that is open when the run ends is saved. Outside ``fit``, the steps of the stage count.

    Files are named ``<filename>-rank<k>-<host>-<pid>-steps<first>-<last>-<n>.pt.trace.json.gz``.
    The table of the latest window is ``rank<k>/profile.txt`` of the run directory. If ``dirpath``
    takes no files, windows go to ``rank<k>/trace`` of the run directory, with one warning; where
    the run directory takes no files either, windows are lost, and the run continues.

    Args:
        dirpath: Folder of the traces; ``None`` for ``rank<k>/trace`` in the run directory.
        filename: Beginning of the names of traces.
        wait: Number of steps at the start of a cycle that are not recorded.
        warmup: Number of steps before each window that are discarded.
        active: Number of steps of a window.
        repeat: Number of cycles; 0 for cycles until the run ends.
        keep: Number of windows on disk; beyond it the oldest window of this run is removed, so
            that a run that dies late has its latest windows, and room for them.
        max_events: Greatest number of events of a window. A window ends early, after at least one
            step, if another step like those recorded last would exceed this number. Without a
            warm-up the first window is not bounded. An event takes about 0.2 kB while recording
            and 1.5 kB when the window closes.
        record_shapes: Whether operators are recorded with the shapes of their inputs.
        profile_memory: Whether allocations are recorded.
        with_stack: Whether operators are recorded with their source lines.
        row_limit: Greatest number of rows of the table for the CPU, and for devices.

    Attributes:
        windows: Windows of this run that are on disk, oldest first. Each is a list of its files in
            order of time: one, or several under a limit on the size of files.
        last_table: Table of operators of the latest window; ``None`` before the first.
        logs_table: Whether the table is logged at the end of a run.

    Raises:
        ValueError: If a number is out of range, or a name is empty or holds a NUL byte.
    """

    # ``__del__`` reads these attributes also if the constructor refused an argument.
    profiler: Any = None
    _recording_map: Any = MappingProxyType({})
    _stage: str | None = None

    @check_arguments
    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str = "window",
        *,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        keep: int = 10,
        max_events: int = 1_000_000,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        row_limit: int = 20,
    ) -> None:
        require_name("WindowProfiler.filename", filename, "a file")
        require_name("WindowProfiler.dirpath", dirpath, "a directory")
        super().__init__(
            None if dirpath is None else expand_home(dirpath),
            filename,
            schedule=None,
            record_module_names=False,
            record_shapes=record_shapes,
            profile_memory=profile_memory,
            with_stack=with_stack,
        )
        for name, value in {"wait": wait, "warmup": warmup, "repeat": repeat}.items():
            at_least(f"WindowProfiler.{name}", value, 0)
        counts = {"active": active, "keep": keep, "max_events": max_events, "row_limit": row_limit}
        for name, value in counts.items():
            at_least(f"WindowProfiler.{name}", value, 1)
        self.wait, self.warmup, self.active, self.repeat = wait, warmup, active, repeat
        self.keep, self.max_events, self.row_limit = keep, max_events, row_limit
        self.logs_table = True
        self._given_dirpath = dirpath
        self._run_directory: str | None = None
        self._rank = 0
        self._begin()

    def _begin(self) -> None:
        self.windows: list[list[Path]] = []
        self.last_table: str | None = None
        self._warned: set[str] = set()
        self._steps = 0  # number of finished steps
        self._first = 0  # first step of the window
        self._events_per_step = 0.0
        self._probing = False
        self._outer: BaseException | None = None

    @override
    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Begin a run."""
        super().setup(stage, local_rank, log_dir)
        self._begin()
        self._rank = getattr(rank_zero_only, "rank", 0) or 0
        self._run_directory = log_dir
        if self._given_dirpath is None and log_dir is not None:
            self.dirpath = RunLayout(Path(log_dir)).rank(self._rank).trace

    @override
    def start(self, action_name: str) -> None:
        """Open a span if a window is open, and a window if its first step begins."""
        if self._is_step(action_name):
            self._outer = sys.exc_info()[1]
            self._before_step()
        if self.profiler is not None and action_name not in self._recording_map:
            span = record_function("[pl][profile]" + action_name)
            span.__enter__()
            self._recording_map[action_name] = span

    @override
    def stop(self, action_name: str) -> None:
        """Close the span, and the window if its last step has ended."""
        span = self._recording_map.pop(action_name, None)
        if span is not None:
            span.__exit__(None, None, None)
        # A step that an exception ended does not count: the open window is evidence.
        if self._is_step(action_name) and sys.exc_info()[1] is self._outer:
            self._after_step()

    def finish_window(self) -> list[Path]:
        """Close the open window and write it, before the schedule would.

        Only the thread that trains may call this. Nothing is recorded afterwards.

        Returns:
            Files of the window; empty without an open window, or if no folder takes it.
        """
        results = self._end_session()
        profile, self.profiler = self.profiler, None
        if results is None or not isinstance(profile, torch.profiler.profile) or self._probing:
            self._probing = False
            return []
        steps = max(1, self._steps - self._first)
        self._events_per_step = len(results.events()) / steps
        self.last_table = operator_table(results, row_limit=self.row_limit)
        try:
            self._write_table(self.last_table)
        except OSError as error:
            self._warn("The table of the latest window cannot be written: %s", error)
        written = self._write_window(profile)
        if written:
            self.windows.append(written)
        self._remove_oldest()
        return written

    def _write_window(self, profile: torch.profiler.profile) -> list[Path]:
        """Write a window into the user's folder, or else the run directory; empty if both fail."""
        places = [Path(self.dirpath or "") / self._name()]
        if self._given_dirpath is not None and self._run_directory is not None:
            folder = RunLayout(Path(self._run_directory)).rank(self._rank).trace
            places.append(folder / self._name("window"))  # the user's filename may be too long
        problem: Exception | None = None
        for path in places:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                written = export_trace(profile, path)
            except (OSError, ValueError) as error:
                problem = problem or error
            else:
                if problem is not None:
                    text = "%s takes no traces (%s): they are in %s"
                    self._warn(text, places[0].parent, problem, path.parent)
                return written
        self._warn("A recorded window is lost: %s", problem)
        return []

    def _warn(self, text: str, *values: object) -> None:
        """Warn once in a run: there may be hundreds of windows."""
        if text not in self._warned:
            self._warned.add(text)
            _log.warning(text, *values)

    @override
    def summary(self) -> str:
        """The table of the latest window."""
        self.finish_window()
        return self.last_table or ""

    @override
    def describe(self) -> None:
        """Save a window that is still open, and log the table."""
        table = self.summary()
        if table and self.logs_table:
            self._rank_zero_info(table)
        self.teardown(stage=self._stage)

    @override
    def teardown(self, stage: str | None) -> None:
        """Stop the recording if a window is still open."""
        self._end_session()
        self.profiler = None

    # The schedule.

    def _is_step(self, action_name: str) -> bool:
        if self._stage in (None, "fit"):
            return action_name == "run_training_batch"  # backward and optimizer are in it
        return action_name.endswith(_OTHER_STEPS)

    def _before_step(self) -> None:
        length = self.wait + self.warmup + self.active
        cycle, position = divmod(self._steps, length)
        if self.profiler is not None or (self.repeat and cycle >= self.repeat):
            return
        if position == self.wait + self.warmup:
            self._first = self._steps
            self._begin_session()
        elif position == self.wait + self.warmup - 1:
            self._first = self._steps
            self._begin_session()
            self._probing = self.profiler is not None

    def _after_step(self) -> None:
        self._steps += 1
        if self.profiler is None:
            return
        recorded = self._steps - self._first
        if self._probing:
            results = self._end_session()
            self._events_per_step = len(results.events()) if results is not None else 0.0
            self._probing, self.profiler = False, None
        elif recorded >= self.active or (recorded + 1) * self._events_per_step > self.max_events:
            self.finish_window()

    def _begin_session(self) -> None:
        if torch.cuda.is_available():
            # Sessions follow each other at once. CUPTI's teardown after the first of them would
            # take the events of the second (pytorch/kineto#1554), and break graphs before 12.6.
            os.environ.setdefault("TEARDOWN_CUPTI", "0")
        kwargs = {k: v for k, v in profiler_settings(self).items() if k in _PROFILE_KWARGS}
        config = kwargs.pop("experimental_config", None) or global_session()
        profile = torch.profiler.profile(**kwargs, experimental_config=config)
        profile.current_action = ProfilerAction.NONE
        if torch._C._autograd._profiler_enabled():  # pyright: ignore[reportPrivateUsage]
            _log.warning("Another profiler is recording: this window is skipped")
            return
        profile.prepare_trace()
        profile.start_trace()
        profile.current_action = ProfilerAction.RECORD
        self.profiler = profile

    def _end_session(self) -> Any:
        """End the recording, and return its results; ``None`` without any."""
        for name in reversed(list(self._recording_map)):
            self._recording_map.pop(name).__exit__(None, None, None)
        profile = self.profiler
        if not isinstance(profile, torch.profiler.profile):
            return None
        if profile.current_action == ProfilerAction.RECORD:
            profile.current_action = ProfilerAction.NONE
            profile.stop_trace()
        results = None if profile.profiler is None else profile.profiler.kineto_results
        return None if results is None or results.trace_start_ns() == 0 else results

    @override
    def _delete_profilers(self) -> None:
        self._end_session()
        self.profiler = None

    # Files.

    def _name(self, filename: str | None = None) -> str:
        process = f"rank{self._rank}-{socket.gethostname()}-{os.getpid()}"
        last = max(self._first, self._steps - 1)
        steps = f"steps{self._first}-{last}-{next(_numbers)}"
        return f"{filename or self.filename}-{process}-{steps}.pt.trace.json.gz"

    def _remove_oldest(self) -> None:
        while len(self.windows) > self.keep:
            for path in self.windows.pop(0):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    _log.warning("An old window cannot be removed: %s", error)

    def _write_table(self, table: str) -> None:
        if self._run_directory is not None:
            path = RunLayout(Path(self._run_directory)).rank(self._rank).profile
            write_atomically(path, table.encode())


_PROFILE_KWARGS = (
    "activities",
    "experimental_config",
    "profile_memory",
    "record_shapes",
    "with_stack",
)
