"""Playing a dead run again, up to the iteration in which it died.

``replay`` does so in the calling process, for any LightningModule; ``esper replay`` starts the
command of the run again, in a process of its own, from the same plan.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils._pytree import tree_leaves

from esper_lightning.callbacks.directory_choice import given_directory
from esper_lightning.callbacks.mirror import place_of
from esper_lightning.core.errors import require
from esper_lightning.core.paths import expand_home
from esper_lightning.forensics.deaths import failing_iteration
from esper_lightning.forensics.remains import Remains, examine, first_failure
from esper_lightning.forensics.replay import Verdict, judge
from esper_lightning.recorder.flight_recorder import FlightRecorder
from esper_lightning.recorder.profiling.window_profiler import WindowProfiler
from esper_lightning.recorder.replay_watch import ReplayWatch, record_left
from esper_lightning.training.checkpoint.replay_starts import beginning, find_starts, state_in

__all__ = [
    "ReplayPlan",
    "plan_replay",
    "replay",
    "replay_directory",
    "require_new_directory",
]

_AFTER = {
    "training": re.compile(r"\bon_train_end\b|\bon_fit_end\b|\bteardown\b"),
    "iteration": re.compile(r"validation_|\bval_next\b|\bon_train_epoch_end\b"),
}
"""Names of the phases that follow the end of training, and those that follow an iteration."""


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """Where a replay starts, and where it ends.

    Attributes:
        dead: Remains of the ranks of the run that died.
        first: Remains of the rank that failed first.
        iteration: Number of the iteration that failed; 0 for a death before the first.
        begins: Number of finished iterations at the start of the replay.
        start: Checkpoint to start from; ``None`` for the beginning of the run.
        deep: Whether the replay runs eagerly.
    """

    dead: tuple[Remains, ...]
    first: Remains
    iteration: int
    begins: int
    start: Path | None
    deep: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks of the run."""
        return self.first.world_size or 1

    def settings_of_watch(self, run_dir: Path) -> dict[str, Any]:
        """The arguments of the ``ReplayWatch`` of this replay.

        Args:
            run_dir: Run directory of the run that died.
        """
        places = {each.directory.absolute(): None for each in self.dead}
        error = None if self.first.report is None else self.first.report.error
        found = None if error is None else error.non_finite
        return {
            "run_dir": str(run_dir.absolute()),
            "more_dirs": [str(place) for place in places if place != run_dir.absolute()],
            "iteration": self.iteration,
            "started_s": self.first.started_s,
            "rank": self.first.rank,
            "begins": self.begins,
            "start": None if self.start is None else str(self.start),
            "deep": self.deep,
            # After a rollout that is not finite, anomaly detection would name another error.
            "finds_anomalies": self.deep and found is not None and found.phase == "update",
            "died_after": _died_after(self.first),
        }

    def settings_of_profiler(self) -> dict[str, Any]:
        """The arguments of a ``WindowProfiler`` whose window lies on the failing iteration."""
        steps = max(1, self.iteration - self.begins)  # the last of them fails
        warmup = min(1, steps - 1)
        # The window stays open after the step, for what callbacks do at the end of an iteration.
        wait = steps - 1 - warmup
        return {"wait": wait, "warmup": warmup, "active": 2, "with_stack": True}


def plan_replay(
    run_dir: Path,
    *more_dirs: Path,
    ckpt_path: Path | None = None,
    from_start: bool = False,
    deep: bool = False,
    loaders: Sequence[Any] = (),
) -> ReplayPlan:
    """Decide where the replay of a dead run starts.

    That is the latest state before the failing iteration that holds the environments of every
    rank, or restores the order of the data: a checkpoint of the run, the state that its ranks have
    stored after an iteration, or the ``before.ckpt`` of an earlier replay whose rows were those of
    the run; otherwise the beginning of the run, which may be the checkpoint that it was resumed
    from.

    Args:
        run_dir: Run directory of the run that died.
        *more_dirs: Copies of the run directory on other hosts, where they share no disk.
        ckpt_path: Checkpoint to start from; ``None`` for the latest that fits.
        from_start: Whether the replay starts at the beginning of the run.
        deep: Whether the replay runs eagerly.
        loaders: Loaders of the training data, as far as they are known.

    Raises:
        ValueError: If the directory holds no death, ``ckpt_path`` is no checkpoint before it or is
            given together with ``from_start``, or
            the replay must start from the checkpoint that the run was resumed from, and that is
            gone or was written again.
    """
    dead = examine(run_dir, *more_dirs)
    first = first_failure(dead)
    if first is None:
        states = ", ".join(sorted({rank.state for rank in dead}))
        message = f"RUN_DIR must hold a run that died, got {str(run_dir)!r}. It is {states}."
        raise ValueError(message)
    iteration = failing_iteration(first)
    if ckpt_path is not None:
        require(not from_start, "--ckpt_path", "be absent with --from_start", str(ckpt_path))
        state = state_in(ckpt_path)
        begins = iteration if state is None else state.iteration
        rule = f"be a checkpoint of all ranks before iteration {iteration}"
        require(begins < iteration, "--ckpt_path", rule, str(ckpt_path))
        starts = {ckpt_path: begins}
    elif from_start:
        starts = beginning(first)
    else:
        starts = find_starts((run_dir, *more_dirs), dead, first, loaders)
    start = max(starts, key=lambda path: starts[path], default=None)
    return ReplayPlan(
        dead=tuple(dead),
        first=first,
        iteration=iteration,
        begins=0 if start is None else starts[start],
        start=start,
        deep=deep,
    )


def _died_after(first: Remains) -> str | None:
    """Name of what was over when a rank died, as in ``_AFTER``; ``None`` where nothing was."""
    phases: Sequence[str] = ()
    if first.report is not None:
        phases = first.report.phases
    elif first.phases is not None:
        phases = [span.name for span in first.phases.open]
    return next((over for over, each in _AFTER.items() if any(map(each.search, phases))), None)


def replay_directory(run_dir: Path) -> Path:
    """A new run directory for a replay, beside the directory of the run that died."""
    run_dir = run_dir.absolute()
    names = (f"replay_of_{run_dir.name}{suffix}" for suffix in _suffixes())
    return next(path for name in names if not (path := run_dir.with_name(name)).exists())


def require_new_directory(field: str, directory: str | Path) -> None:
    """Refuse a directory for a replay in which something is already.

    Raises:
        ValueError: If the directory is neither new nor empty; the error names the setting.
    """
    place = place_of(directory)[0]
    is_new = not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir()))
    hint = "A replay writes into a directory of its own."
    require(is_new, field, "name a new or empty directory", str(directory), hint)


def _suffixes() -> Iterator[str]:
    yield ""
    number = 1
    while True:
        number += 1
        yield f"_{number}"


def replay(
    trainer: Trainer,
    model: LightningModule,
    run_dir: str | Path,
    *,
    more_dirs: Sequence[str | Path] = (),
    deep: bool = False,
    ckpt_path: str | Path | None = None,
    from_start: bool = False,
    **data: Any,
) -> Verdict:
    """Play a dead run again, up to the iteration in which it died, in this process.

    Trainer and module must be made as for the run that died, with the same settings, limits and
    callbacks. The replay writes into a run directory of its own, checkpoints included: that which
    a callback of the Trainer was given, or a new one beside that of the run. It works for PPO, and
    for any module whose data come in an order that a checkpoint restores. What ends the process
    (SIGKILL, a fault in C) ends this function, too: ``esper crash`` then prints the verdict.

    Args:
        trainer: Trainer that has not run. It gets a ``WindowProfiler`` in place of its profiler.
        model: Module that has not run.
        run_dir: Run directory of the run that died; nothing is written there.
        more_dirs: Copies of the run directory on other hosts, where they share no disk.
        deep: Whether autograd looks for anomalies in an update that failed; a module that compiles
            must be made without compilation by the caller.
        ckpt_path: Checkpoint to start from; ``None`` for the latest that fits.
        from_start: Whether the replay starts at the beginning of the run, where no state is absent
            that no checkpoint holds, such as the counters of a callback.
        **data: Further arguments of ``Trainer.fit``: ``train_dataloaders``, ``datamodule`` and
            ``val_dataloaders``.

    Returns:
        The verdict; its ``lines`` are the verdict in words.

    Raises:
        ValueError: If ``run_dir`` holds no death, or a callback was given a directory in which
            something is already.
        BaseException: An error of the replay before its first iteration.
    """
    run_dir = expand_home(run_dir)
    starts_from = None if ckpt_path is None else expand_home(ckpt_path)
    plan = plan_replay(
        run_dir,
        *map(expand_home, more_dirs),
        ckpt_path=starts_from,
        from_start=from_start,
        deep=deep,
        loaders=tree_leaves(data.get("train_dataloaders")),
    )
    watch = ReplayWatch(**plan.settings_of_watch(run_dir))
    recorders = [each for each in trainer.callbacks if isinstance(each, FlightRecorder)]
    recorder = recorders[0] if recorders else FlightRecorder(watch=False)
    given = given_directory(trainer)
    if given is None:
        recorder.dirpath = replay_directory(run_dir)
    elif trainer.is_global_zero:  # the other ranks may find what it has begun
        require_new_directory("The dirpath of a callback", given)
    trainer.callbacks = [*trainer.callbacks, *([] if recorders else [recorder]), watch]
    trainer.profiler = WindowProfiler(**plan.settings_of_profiler())
    try:
        trainer.fit(model, ckpt_path=plan.start, weights_only=True, **data)
    except BaseException:
        directory = watch.directory or Path(recorder.dirpath or place_of(given or "")[0])
        if record_left(directory, watch.record) is None:
            raise
        # The death is that of the replay, and its evidence is on disk: the verdict names it.
        with_report = [each.failed for each in examine(directory)]
        if not any(with_report):
            raise
        return judge(directory, plan.dead)
    assert watch.directory is not None
    return judge(watch.directory, plan.dead)
