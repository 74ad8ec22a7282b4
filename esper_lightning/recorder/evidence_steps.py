"""The steps of saving evidence, in order: cheap and certain first, slow and fragile last."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import distributed as dist

from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.loggers import flush_logger
from esper_lightning.forensics.asides import rename_aside
from esper_lightning.forensics.files import replacing, write_atomically
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.recorder.attempt import attempt
from esper_lightning.recorder.collectives import latest_collectives
from esper_lightning.recorder.crash_checkpoint import save_crash_checkpoint
from esper_lightning.recorder.death import Death
from esper_lightning.recorder.evidence import SENTENCE_LENGTH, HoldsEvidence
from esper_lightning.recorder.memory_snapshot import save_memory
from esper_lightning.recorder.profiler_guard import ProfilerGuard
from esper_lightning.recorder.signals import dump_stacks

__all__ = [
    "ALL_HOLDERS_S",
    "HOLDER_S",
    "STEPS",
    "DyingRun",
    "EvidenceStep",
    "StepOutcome",
    "steps_of_holders",
]

HOLDER_S, ALL_HOLDERS_S = 5.0, 10.0
"""Time limits of a user's callback, and of all of them together."""


@dataclass(kw_only=True)
class DyingRun:
    """The dying run, as the steps of saving evidence need it."""

    trainer: Trainer
    """Trainer of the run."""
    files: RankLayout
    """Folder of this rank."""
    guard: ProfilerGuard
    """Guard of the run's profiler."""
    callbacks: Callable[[], Sequence[Callback]]
    """Callbacks that the run had at any time."""
    death: Death
    """Death that ends the run."""
    started_s: float
    """When the recording began, in seconds since the epoch."""
    bounded: bool
    """Whether steps may have threads of their own; false in a signal handler."""
    print_profile: bool
    """Whether the table of the window is printed on the first rank."""
    write_report: Callable[[], None]
    """Writes the report as it is at the call."""
    table: str | Exception | None = None
    """The profiler's table, once the trace is saved: empty where a table would take too long, an
    error where the error prevented the table, and ``None`` where the profiler has no table."""

    def report(self) -> None:
        """Write the report as it is now."""
        self.write_report()


class StepOutcome(NamedTuple):
    """Outcome of a step, for the report; the states are those of ``forensics.report.Evidence``."""

    state: str
    path: Path | None = None
    detail: str | None = None


def _always(_: DyingRun) -> bool:
    return True


class EvidenceStep(NamedTuple):
    """A step of saving evidence."""

    name: str
    """Name of the evidence in the report."""
    save: Callable[[DyingRun], StepOutcome | None]
    """Saves the evidence; an error is a failure, and ``None`` leaves the report unchanged."""
    seconds: float | None
    """Time limit, in a thread of its own; ``None`` for the calling thread and no limit."""
    when: Callable[[DyingRun], bool] = _always
    """Whether the step is needed."""
    folder: Path | None = None
    """Folder of a callback's evidence, some of which may be there although the callback failed."""


def _is_bounded(run: DyingRun) -> bool:
    return run.bounded


def _save_history(run: DyingRun) -> StepOutcome:
    path = run.files.history
    waiting = sum(each.waiting for each in run.callbacks() if isinstance(each, History))
    if waiting:
        raise OSError(f"the disk has not taken the last {waiting} rows")
    if not path.exists():
        return StepOutcome("absent", detail="no iteration was finished")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # rows are then safe from a power failure, too
    finally:
        os.close(descriptor)
    with path.open("rb") as file:
        rows = sum(1 for _ in file)
    earlier = path.stat().st_mtime < run.started_s
    return StepOutcome(
        "saved", path, f"{rows} rows" + (", all of an earlier run" if earlier else "")
    )


def _flush_loggers(run: DyingRun) -> StepOutcome:
    for logger in run.trainer.loggers:
        flush_logger(logger)
    return StepOutcome("saved", detail=f"{len(run.trainer.loggers)} flushed")


def _ran_out_of_cuda_memory(run: DyingRun) -> bool:
    return isinstance(run.death.error, torch.OutOfMemoryError) and torch.cuda.is_available()


def _save_memory(run: DyingRun) -> StepOutcome:
    path = run.files.memory
    if not path.exists():  # the allocator's observer may have written it in time
        save_memory(path)
    return StepOutcome("saved", path, "CUDA allocator")


def _has_stacks_to_show(run: DyingRun) -> bool:
    bounded = run.death.cause in ("signal", "hang", "peer", "exit") and run.bounded
    return bounded or run.death.cause == "native"


def _save_stacks(run: DyingRun) -> StepOutcome:
    path = run.files.stacks
    if run.death.cause == "native":  # the handler of the fault has written the stacks
        return StepOutcome("saved", path)
    dump_stacks(path, f"{run.death.cause}: {run.death.reason}")
    return StepOutcome("saved", path, "Python stacks of all threads")


def _has_collectives(run: DyingRun) -> bool:
    return run.bounded and dist.is_available() and dist.is_initialized()


def _save_collectives(run: DyingRun) -> StepOutcome:
    latest = latest_collectives()
    if latest is None:
        return StepOutcome("absent", detail="this version of torch has no record of them")
    write_atomically(run.files.collectives, latest)
    return StepOutcome("saved", run.files.collectives, "the latest collectives")


def _save_checkpoint(run: DyingRun) -> StepOutcome:
    path = run.files.crash_checkpoint
    if path.exists() and path.stat().st_mtime < run.started_s:
        rename_aside(path)
    if not run.bounded:
        return StepOutcome("absent", detail="not from within a native fault")
    if not run.trainer.strategy.optimizers:
        return StepOutcome("absent", detail="training had not begun")
    return StepOutcome("saved", path, save_crash_checkpoint(run.trainer, path, run.death.reason))


def _save_minibatch(run: DyingRun) -> StepOutcome:
    minibatch: Any = getattr(run.death.error, "minibatch", None)
    if minibatch is None:
        return StepOutcome("absent", detail="no value was found not to be finite")
    path = run.files.bad_minibatch
    if not path.exists():
        with replacing(path) as temporary:
            torch.save(minibatch, temporary)
    return StepOutcome("saved", path, "the minibatch that was not finite")


def _announce_trace(_: DyingRun) -> StepOutcome:
    return StepOutcome("pending")


def _save_trace(run: DyingRun) -> StepOutcome:
    guard, action = run.guard, run.guard.action
    if guard.has_window:
        paths, run.table = guard.finish()
        detail = "the window that was open, up to the death"
        if len(paths) > 1:
            detail += f"; in {len(paths)} pieces, of which this is the last"
        return StepOutcome("saved", paths[-1], detail)
    waiting = {"NONE": "the profiler was waiting", "WARMUP": "the profiler was warming up"}
    detail = guard.why_no_session if action is None else waiting.get(action, action)
    guard.abandon()
    try:
        run.table = guard.text() or None
    except Exception as error:
        run.table = error
    return StepOutcome("absent", detail=f"{detail}; closed windows stay")


def _has_table(run: DyingRun) -> bool:
    return run.table is not None


def _save_table(run: DyingRun) -> StepOutcome:
    if isinstance(run.table, Exception):
        raise run.table
    if not run.table:
        detail = "the window is too large for a table at a death; esper crash reads the trace"
        return StepOutcome("absent", detail=detail)
    write_atomically(run.files.profile, run.table.encode())
    if run.print_profile and run.trainer.global_rank == 0:
        print(run.table, flush=True)  # noqa: T201 - the summary belongs on the console
    return StepOutcome("saved", run.files.profile, "of the open window")


STEPS = (
    EvidenceStep("history", _save_history, 5),
    EvidenceStep("loggers", _flush_loggers, 5, when=_is_bounded),
    EvidenceStep("trace", _announce_trace, None),
    EvidenceStep("report", DyingRun.report, None),
    EvidenceStep("memory", _save_memory, 20, when=_ran_out_of_cuda_memory),
    EvidenceStep("stacks", _save_stacks, 5, when=_has_stacks_to_show),
    EvidenceStep("collectives", _save_collectives, 5, when=_has_collectives),
    EvidenceStep("checkpoint", _save_checkpoint, 30),
    EvidenceStep("minibatch", _save_minibatch, 20),
    # Sessions that are not global must be stopped by the thread that started them.
    EvidenceStep("trace", _save_trace, None),
    EvidenceStep("profile", _save_table, 5, when=_has_table),
)
"""The recorder's own steps. The early report survives a second death during the later steps."""


def steps_of_holders(run: DyingRun) -> list[EvidenceStep]:
    """A step for each callback, and for the module, that holds evidence; they are taken last.

    Args:
        run: Run that dies.

    Returns:
        The steps, each under the name of the holder's class.
    """
    steps: list[EvidenceStep] = []
    names = {step.name for step in STEPS}
    candidates: list[Any] = [*run.callbacks(), run.trainer.lightning_module]
    for holder in candidates:
        # An object that has every attribute may raise here.
        if attempt(lambda each=holder: isinstance(each, HoldsEvidence)).result:
            name = kind = type(holder).__name__
            number = 1
            while name in names:
                number += 1
                name = f"{kind}-{number}"
            names.add(name)
            folder = run.files.evidence / name
            save = partial(_save_of, holder, folder)
            steps.append(EvidenceStep(name, save, HOLDER_S, folder=folder))
    return steps


def _save_of(holder: HoldsEvidence, folder: Path, run: DyingRun) -> StepOutcome:
    with contextlib.suppress(OSError):  # the holder may save it elsewhere
        folder.mkdir(parents=True, exist_ok=True)
    try:
        said = holder.save_evidence(folder, run.death)
    finally:
        with contextlib.suppress(OSError):  # folders that are not empty stay
            folder.rmdir()
            folder.parent.rmdir()
    path = folder if folder.exists() else None
    if said is None and path is None:
        return StepOutcome("absent", detail="it had nothing to save")
    return StepOutcome("saved", path, None if said is None else _line(said))


def _line(sentence: object) -> str:
    line = " ".join(str(sentence).split())
    return line if len(line) <= SENTENCE_LENGTH else line[: SENTENCE_LENGTH - 3] + "..."
