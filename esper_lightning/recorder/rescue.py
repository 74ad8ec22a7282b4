"""Saving what a dying run knows: cheap and certain first, slow and fragile last.

Each step is guarded, bounded in time, and told in the report. Nothing here raises, starts a
collective, or needs the main thread to be well.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.loggers import flush_logger
from esper_lightning.forensics.asides import set_aside
from esper_lightning.forensics.files import replacing, write_atomically
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.report import write_report
from esper_lightning.recorder.crash_checkpoint import save_crash_checkpoint
from esper_lightning.recorder.death import (
    Death,
    describe,
    describe_error,
    exit_status,
    in_words,
)
from esper_lightning.recorder.memory_snapshot import save_memory
from esper_lightning.recorder.profiler_guard import ProfilerGuard, unrecorded
from esper_lightning.recorder.signals import dump_stacks
from esper_lightning.recorder.watchdog import awake_s

__all__ = ["Rescue"]

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Rescue:
    """Saves the evidence of one death of one rank."""

    trainer: Trainer
    files: RankLayout
    ring: PhaseRing
    guard: ProfilerGuard
    print_profile: bool
    process: Mapping[str, Any]  # which one this is, as in process.json
    bounded: bool = True  # whether steps may take threads of their own: not in a signal handler
    report: dict[str, Any] = field(default_factory=dict[str, Any])
    written: Path | None = None  # where the report is
    begun_s: float = field(default_factory=awake_s)
    progress_s: float = field(default_factory=awake_s)  # when the latest step began

    @property
    def started_s(self) -> float:
        """When the recording began."""
        return self.process["started_s"]

    def run(self, death: Death) -> None:
        """Take all steps."""
        with unrecorded():
            self._run(death)

    def _run(self, death: Death) -> None:
        started = time.monotonic()
        self.report = {**self.process, "cause": death.cause}
        self.report |= {"evidence": {}, "complete": False}
        self._guarded("profiler", self._describe_profiler)
        self._guarded("death", lambda: self.report.update(self._describe(death)))
        self._step("history", self._flush_history, seconds=5)
        if self.bounded:
            self._step("loggers", self._flush_loggers, seconds=5)
        self._evidence("trace", "pending")
        self._guarded("report", self._write_report)
        if isinstance(death.error, torch.OutOfMemoryError) and torch.cuda.is_available():
            self._step("memory", self._save_memory, seconds=20)
        if death.cause in ("signal", "hang", "peer", "exit") and self.bounded:
            self._step("stacks", lambda: self._save_stacks(death), seconds=5)
        elif death.cause == "native":
            self._evidence("stacks", "saved", self.files.stacks)
        self._guarded("checkpoint", lambda: self._save_checkpoint(death))
        self._step("minibatch", lambda: self._save_minibatch(death), seconds=20)
        self._guarded("trace", self._save_trace_and_table)
        self.report |= {"complete": True, "duration_s": round(time.monotonic() - started, 4)}
        self._guarded("report", self._write_report)

    def amend(self, error: BaseException) -> None:
        """Add the error that the main thread met after its evidence had been saved for it."""
        if self.report and self.report.get("error") is None:
            self.report |= {"error": describe_error(error), "exit_status": exit_status(error)}
            self._guarded("report", self._write_report)

    # What happened.

    def _describe(self, death: Death) -> dict[str, Any]:
        return describe(death, self.trainer, self.ring)

    def _describe_profiler(self) -> None:
        profiler, name = self.guard.profiler, type(self.guard.profiler).__name__
        self.report["profiler"] = None
        if name != "PassThroughProfiler":
            dirpath = None if profiler.dirpath is None else str(Path(profiler.dirpath).absolute())
            described = {"class": name, "action": self.guard.action, "dirpath": dirpath}
            self.report["profiler"] = described

    # Steps.

    def _flush_history(self) -> tuple[Path, str]:
        path = self.files.history
        histories = [c for c in self.trainer.callbacks if isinstance(c, History)]
        waiting = sum(history.waiting for history in histories)
        if waiting:
            raise OSError(f"the disk has not taken the last {waiting} rows")
        if not path.exists():
            raise _AbsentError("no iteration was finished")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what was appended is safe from a power failure, too
        finally:
            os.close(descriptor)
        with path.open("rb") as file:
            rows = sum(1 for _ in file)
        earlier = path.stat().st_mtime < self.started_s
        return path, f"{rows} rows" + (", all of an earlier run" if earlier else "")

    def _flush_loggers(self) -> tuple[None, str]:
        for logger in self.trainer.loggers:
            flush_logger(logger)
        return None, f"{len(self.trainer.loggers)} flushed"

    def _save_memory(self) -> tuple[Path, str]:
        if not self.files.memory.exists():  # else the allocator's observer wrote it in time
            save_memory(self.files.memory)
        return self.files.memory, "CUDA allocator"

    def _save_stacks(self, death: Death) -> tuple[Path, str]:
        dump_stacks(self.files.stacks, f"{death.cause}: {death.reason}")
        return self.files.stacks, "Python stacks of all threads"

    def _save_checkpoint(self, death: Death) -> None:
        path = self.files.crash_checkpoint
        if path.exists() and path.stat().st_mtime < self.started_s:
            set_aside(path)
        if not self.bounded:
            self._evidence("checkpoint", "absent", detail="not from within a native fault")
        elif not self.trainer.strategy.optimizers:
            self._evidence("checkpoint", "absent", detail="training had not begun")
        else:

            def save() -> tuple[Path, str]:
                return path, save_crash_checkpoint(self.trainer, path, death.reason)

            self._step("checkpoint", save, seconds=30)

    def _save_minibatch(self, death: Death) -> tuple[Path, str]:
        minibatch = getattr(death.error, "minibatch", None)
        if minibatch is None:
            raise _AbsentError("no value was found not to be finite")
        path = self.files.bad_minibatch
        if not path.exists():
            with replacing(path) as temporary:
                torch.save(minibatch, temporary)
        return path, "the minibatch that was not finite"

    def _save_trace_and_table(self) -> None:
        table = self._save_trace()
        if table:
            self._step("profile", lambda: self._save_profile(table), seconds=5)

    def _save_trace(self) -> str:
        """Returns the table to show."""
        guard, action = self.guard, self.guard.action
        tables: list[str] = []

        def export() -> tuple[Path, str]:
            paths, table = guard.finish()
            tables.append(table)
            if not table:
                detail = (
                    "the window is too large for a table at a death; esper crash reads the trace"
                )
                self._evidence("profile", "absent", detail=detail)
            detail = "the window that was open, up to the death"
            if len(paths) > 1:
                detail += f"; in {len(paths)} pieces, of which this is the last"
            return paths[-1], detail

        if guard.has_window:
            # Sessions that are not global must be stopped by the thread that started them.
            self._step("trace", export, seconds=None)
            return "".join(tables)
        waiting = {"NONE": "the profiler was waiting", "WARMUP": "the profiler was warming up"}
        detail = guard.why_no_session if action is None else waiting.get(action, action)
        guard.abandon()
        self._evidence("trace", "absent", detail=f"{detail}; closed windows stay")
        try:
            return guard.text()
        except Exception as error:
            self._evidence("profile", "failed", detail=in_words(error))
            return ""

    def _save_profile(self, table: str) -> tuple[Path, str]:
        write_atomically(self.files.profile, table.encode())
        if self.print_profile and self.trainer.global_rank == 0:
            print(table, flush=True)  # noqa: T201 - the summary belongs on the console
        return self.files.profile, "of the open window"

    # How steps are taken.

    def _step(
        self, name: str, action: Callable[[], tuple[Path | None, str]], *, seconds: float | None
    ) -> None:
        """Take a step and write down how it went."""
        self.progress_s = awake_s()
        failures: list[BaseException] = []
        results: list[tuple[Path | None, str]] = []

        def take() -> None:
            try:
                with unrecorded():
                    results.append(action())
            except BaseException as error:
                failures.append(error)

        in_time = True
        if self.bounded and seconds is not None:
            in_time = _finishes(take, seconds)
        else:
            take()
        if results:
            self._evidence(name, "saved", *results[0])
        elif failures and isinstance(failures[0], _AbsentError):
            self._evidence(name, "absent", detail=str(failures[0]))
        elif failures:
            self._evidence(name, "failed", detail=in_words(failures[0]))
        elif not in_time:
            self._evidence(name, "failed", detail=f"not done within {seconds} s")

    def _guarded(self, name: str, action: Callable[[], object]) -> None:
        """For what is no step of its own: an error is told, and the next step follows."""
        try:
            action()
        except Exception as error:
            _log.error("While saving evidence (%s): %s", name, in_words(error))
            self._evidence(name, "failed", detail=in_words(error))

    def _evidence(
        self, name: str, state: str, path: Path | None = None, detail: str | None = None
    ) -> None:
        where = None
        if path is not None:
            inside = path.is_relative_to(self.files.directory)
            where = str(path.relative_to(self.files.directory) if inside else path)
        self.report["evidence"][name] = {"state": state, "path": where, "detail": detail}

    def _write_report(self) -> None:
        # In a container every run may be process 1.
        name = f"crash-{os.getpid()}-{self.started_s:.3f}-{self.files.directory.name}.json"
        elsewhere = Path(tempfile.gettempdir()) / name
        for path in (self.files.crash, elsewhere):
            try:
                write_report(path, self.report)
            except Exception as error:
                _log.error("The crash report cannot be written to %s: %s", path, in_words(error))
            else:
                self.written = path
                return


class _AbsentError(Exception):
    """There is nothing to save, and that is no failure."""


def _finishes(action: Callable[[], None], seconds: float) -> bool:
    thread = threading.Thread(target=action, daemon=True, name="flight-recorder-step")
    try:
        thread.start()
    except RuntimeError:  # no memory for a thread
        action()
        return True
    end = awake_s() + seconds
    while thread.is_alive() and awake_s() < end:
        thread.join(0.1)
    return not thread.is_alive()
