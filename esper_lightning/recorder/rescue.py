"""The rescue of a dying run's evidence: each step is guarded, limited in time, and reported.

Nothing in this module raises, calls a collective, or needs the main thread to run.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning.pytorch import Callback, Trainer

from esper_lightning.forensics.layout import RankLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.rank_record import RankRecord
from esper_lightning.forensics.report import CrashReport, Evidence, ProfilerReport
from esper_lightning.recorder.attempt import LateError, attempt
from esper_lightning.recorder.awake import awake_s
from esper_lightning.recorder.death import (
    Death,
    describe,
    describe_error,
    exit_status,
    in_words,
)
from esper_lightning.recorder.evidence_steps import (
    ALL_HOLDERS_S,
    HOLDER_S,
    STEPS,
    DyingRun,
    EvidenceStep,
    StepOutcome,
    steps_of_holders,
)
from esper_lightning.recorder.profiler_guard import ProfilerGuard, unrecorded

__all__ = ["Rescue"]

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Rescue:
    """The rescue of the evidence of one death of one rank."""

    trainer: Trainer
    files: RankLayout
    ring: PhaseRing
    guard: ProfilerGuard
    print_profile: bool
    process: RankRecord  # identity of the recording, as in process.json
    callbacks: Callable[[], Sequence[Callback]]  # all that the run had at any time
    bounded: bool = True  # whether steps may have own threads; false in a signal handler
    report: CrashReport = field(default_factory=CrashReport)
    written: Path | None = None  # path of the report once it is written
    begun_s: float = field(default_factory=awake_s)
    progress_s: float = field(default_factory=awake_s)  # when the latest step began
    is_done: bool = False  # whether all steps have been taken

    @property
    def started_s(self) -> float:
        """Begin of the recording, in seconds since the epoch."""
        return self.process.started_s or 0.0

    def run(self, death: Death) -> None:
        """Take all steps, without recording them in the window of the profiler."""
        with unrecorded():
            self._run(death)

    def _run(self, death: Death) -> None:
        started = time.monotonic()
        self.report = CrashReport(**self.process.of_rank(), cause=death.cause)
        self._attempt("profiler", self._describe_profiler)
        self._attempt("death", lambda: self._describe(death))
        run = DyingRun(
            trainer=self.trainer,
            files=self.files,
            guard=self.guard,
            callbacks=self.callbacks,
            death=death,
            started_s=self.started_s,
            bounded=self.bounded,
            print_profile=self.print_profile,
            write_report=self._write_report,
        )
        for step in STEPS:
            self._take(step, run)
        self._ask_holders(run)
        duration_s = round(time.monotonic() - started, 4)
        self.report = replace(self.report, complete=True, duration_s=duration_s)
        self._attempt("report", self._write_report)

    def amend(self, error: BaseException) -> None:
        """Add the error of the main thread, whose evidence another thread had saved before."""
        if self.report.cause is not None and self.report.error is None:
            described = describe_error(error)
            self.report = replace(self.report, error=described, exit_status=exit_status(error))
            self._attempt("report", self._write_report)

    # Description of the death.

    def _describe(self, death: Death) -> None:
        self.report = describe(self.report, death, self.trainer, self.ring)

    def _describe_profiler(self) -> None:
        profiler, name = self.guard.profiler, type(self.guard.profiler).__name__
        if name != "PassThroughProfiler":
            dirpath = None if profiler.dirpath is None else str(Path(profiler.dirpath).absolute())
            action = self.guard.action
            described = ProfilerReport(class_name=name, action=action, dirpath=dirpath)
            self.report = replace(self.report, profiler=described)

    # Steps.

    def _take(self, step: EvidenceStep, run: DyingRun) -> None:
        """Take a step, if it is needed, and add its outcome to the report."""
        self.progress_s = awake_s()

        def save() -> StepOutcome | None:
            with unrecorded():
                return step.save(run)

        is_needed, error = attempt(lambda: step.when(run), what=None)
        result = None
        if is_needed:
            seconds = step.seconds if self.bounded else None
            result, error = attempt(save, what=None, errors=BaseException, seconds=seconds)
        if error is not None:
            detail = str(error) if isinstance(error, LateError) else in_words(error)
            path = step.folder if step.folder and _has_files(step.folder) else None
            self._evidence(step.name, "failed", path, detail)
        elif result is not None:
            self._evidence(step.name, *result)

    def _ask_holders(self, run: DyingRun) -> None:
        """Take the steps of users' callbacks, which share a time budget.

        The report is complete but for these steps before the first one is taken: any of them may be
        the last thing that this process does.
        """
        holders = attempt(lambda: steps_of_holders(run)).result or []
        if not holders or not self.bounded:
            return
        for step in holders:
            self._evidence(step.name, "pending")
        self._attempt("report", self._write_report)
        end_s = awake_s() + ALL_HOLDERS_S
        for step in holders:
            left_s = end_s - awake_s()
            if left_s <= 0:
                detail = f"not asked: others took all of the {ALL_HOLDERS_S:g} s"
                self._evidence(step.name, "failed", detail=detail)
            else:
                self._take(step._replace(seconds=min(HOLDER_S, left_s)), run)

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        """Call an action that is no step; its error is added to the report."""
        error = attempt(action, f"saving evidence ({name})").error
        if error is not None:
            self._evidence(name, "failed", detail=in_words(error))

    def _evidence(
        self, name: str, state: str, path: Path | None = None, detail: str | None = None
    ) -> None:
        where = None
        if path is not None:
            inside = path.is_relative_to(self.files.directory)
            where = str(path.relative_to(self.files.directory) if inside else path)
        entry = Evidence(state=state, path=where, detail=detail)
        self.report = replace(self.report, evidence={**self.report.evidence, name: entry})

    def _write_report(self) -> None:
        # In a container every run may be process 1.
        name = f"crash-{os.getpid()}-{self.started_s:.3f}-{self.files.directory.name}.json"
        elsewhere = Path(tempfile.gettempdir()) / name
        for path in (self.files.crash, elsewhere):
            try:
                self.report.write(path)
            except Exception as error:
                _log.error("The crash report cannot be written to %s: %s", path, in_words(error))
            else:
                self.written = path
                return


def _has_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:  # there is no such folder, or the disk is gone
        return False
