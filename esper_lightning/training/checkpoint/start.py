"""What a run starts from: the checkpoint that ``ckpt_path`` names, or a stored state.

``esper fit``, ``Trainer`` and ``train_ppo_vectorized`` look for it before the run begins, and
``PPO`` within a run of Lightning's own Trainer. Lightning itself looks for ``last.ckpt`` alone.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning.pytorch import Trainer

from esper_lightning.callbacks.checkpoint_internals import (
    checkpoint_to_load,
    load_in_place_of_last,
    parse_checkpoint_path,
    resumes_last,
)
from esper_lightning.callbacks.directory_choice import known_directory
from esper_lightning.callbacks.logger_folders import numbered_logger
from esper_lightning.callbacks.mirror import place_of
from esper_lightning.callbacks.run_directory import run_directory
from esper_lightning.core.paths import expand_home
from esper_lightning.core.ranks import Ranks
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.files import write_checkpoint
from esper_lightning.training.checkpoint.hooks import CheckpointHooks
from esper_lightning.training.checkpoint.kept import latest_state
from esper_lightning.training.checkpoint.sharing import SharedCheckpoint
from esper_lightning.training.checkpoint.states import load_checkpoint

__all__ = [
    "Start",
    "begin_or_resume",
    "find_start",
    "resume_later_state",
    "resumed_directory",
    "settle_start",
]

_log = logging.getLogger(__name__)
_NAMES = ("last", "best", "hpc")  # of files, for Lightning


class Start(NamedTuple):
    """What a run starts from."""

    path: str | None
    """Path of the checkpoint; ``None`` for a new run."""
    checkpoint: dict[str, Any] | None
    """Its content."""
    is_file: bool
    """Whether the file exists; otherwise ``write`` makes it once the run owns its directory."""
    said: str
    """What the user should know, in one line; may be empty."""

    @property
    def iteration(self) -> int:
        """Number of iterations that are finished."""
        return 0 if self.checkpoint is None else self.checkpoint[STATE_KEY]["iteration"]

    def refuse(self, model: CheckpointHooks, trainer: Trainer, *, fits: bool = True) -> None:
        """Refuse a checkpoint that a model cannot use.

        Args:
            model: Model of the run.
            trainer: Trainer of the run.
            fits: Whether the run trains, and does not only evaluate.

        Raises:
            ValueError: If the checkpoint does not fit. The error names what does not fit.
        """
        if self.checkpoint is not None:
            model.refuse_checkpoint(
                self.checkpoint,
                str(self.path),
                world_size=trainer.world_size if fits else None,
                callbacks=cast(Any, trainer).callbacks,
            )

    def write(self) -> None:
        """Write the stored states that the run resumes from as a checkpoint of the run.

        Raises:
            OSError: If the disk takes no more.
        """
        assert self.path is not None
        assert self.checkpoint is not None
        path = Path(self.path)
        path.parent.mkdir(exist_ok=True)
        write_checkpoint(self.checkpoint, path)


def find_start(trainer: Trainer, name: str | Path | None, run_dir: str | Path | None) -> Start:
    """The checkpoint that a name or path stands for; nothing is written, and no logger begins.

    ``last`` is the latest of ``last.ckpt`` and the states that the ranks of a killed run have
    stored in the run directory.

    Args:
        trainer: Trainer of the run.
        name: Value of ``ckpt_path``.
        run_dir: The run directory, whose files on this machine count; ``None`` for a new one.

    Raises:
        ValueError: If the file is no whole checkpoint of PPO.
    """
    if name is None:
        return Start(None, None, is_file=True, said="")
    layout = None if run_dir is None else RunLayout(place_of(run_dir)[0])
    path = str(name)
    if path in _NAMES:
        path = parse_checkpoint_path(trainer, path, layout and layout.checkpoints)
    checkpoint = None if path is None else load_checkpoint(path)
    found = Start(path, checkpoint, is_file=True, said="")
    kept = None if layout is None else latest_state(layout.directory)
    is_later = kept is not None and kept.iteration > found.iteration
    if name == "last" and layout is not None and kept is not None and is_later:
        said = f"Resuming after iteration {kept.iteration}, the latest one stored."
        return Start(str(layout.joined_state), kept.checkpoint, is_file=False, said=said)
    if path is None:
        said = "No checkpoint to resume from: a new run begins."
        if layout is not None and any(each.exists() for each in layout.rank(0).states):
            said += f" The states in {layout.rank(0).directory} are torn, or not of all ranks."
        return found._replace(said=said)
    if kept is not None and is_later and _is_within(path, layout):
        text = "Resuming after iteration %d. ckpt_path 'last' would resume after iteration %d."
        return found._replace(said=text % (found.iteration, kept.iteration))
    return found


def settle_start(
    start: Start,
    trainer: Trainer,
    model: CheckpointHooks,
    name: str | Path | None,
    run_dir: str | Path | None,
) -> Start:
    """What a run starts from, now that the run owns its directory: a file, if there is any.

    Args:
        start: What ``find_start`` has found.
        trainer: Trainer of the run.
        model: Model of the run.
        name: Value of ``ckpt_path``.
        run_dir: The run directory. If it is an address, its files may have been fetched by now.

    Raises:
        ValueError: If a file that was fetched is no checkpoint of the run.
        OSError: If the disk takes no more.
    """
    if name == "last" and run_dir is not None and place_of(run_dir)[1] is not None:
        start = find_start(trainer, name, run_dir)
        start.refuse(model, trainer)
    if not start.is_file and trainer.is_global_zero:
        start.write()
    return start


def begin_or_resume(
    trainer: Trainer,
    model: CheckpointHooks,
    name: str | Path | None,
    run_dir: str | Path | None,
    *,
    folder: str | Path,
    begin: Callable[[str | Path | None], None],
) -> str | Path | None:
    """Begin a run of a program, with ``last`` where an earlier run has ended.

    Args:
        trainer: Trainer of the run.
        model: Model of the run.
        name: Value of ``ckpt_path``.
        run_dir: The run directory; ``None`` for a new one, or with ``last`` for the newest one.
        folder: Folder of the numbered run directories of the task.
        begin: Function that claims the run directory that it is given.

    Returns:
        The path for ``Trainer.fit(ckpt_path=...)`` of Lightning; ``None`` for a new run.

    Raises:
        ValueError: If what was found is no checkpoint of the run.
        OSError: If the disk takes no more.
        Exception: Whatever ``begin`` raises.
    """
    if name != "last" or cast(Any, trainer).fast_dev_run:
        begin(run_dir)
        return name
    if run_dir is None:
        run_dir = resumed_directory(trainer, folder)
    start = find_start(trainer, name, run_dir)
    start.refuse(model, trainer)
    begin(run_dir)
    start = settle_start(start, trainer, model, name, run_dir)
    if trainer.is_global_zero and start.said:
        print(start.said)  # noqa: T201 - the user asked where the run begins
    return start.path


def resumed_directory(trainer: Trainer, folder: str | Path) -> str | Path | None:
    """The run directory in which ``ckpt_path="last"`` resumes; ``None`` where no run is.

    Args:
        trainer: Trainer of a run that was given no run directory by itself: a callback or a logger
            may have been given one.
        folder: Folder of the numbered run directories of the task. Those of a logger with a
            numbered folder for each run are in the logger's.

    Returns:
        The directory that was given, or the newest one with a checkpoint or a state that all ranks
        have stored.
    """
    given, logger = known_directory(trainer), numbered_logger(trainer)
    if given is not None:
        return given
    runs = place_of(folder if logger is None else logger.root_dir)[0]
    for directory in sorted(runs.glob("version_*"), key=_version, reverse=True):
        if RunLayout(directory).last_checkpoint.exists() or latest_state(directory) is not None:
            return directory
    return None


def resume_later_state(trainer: Trainer) -> None:
    """Make a run of Lightning's own Trainer with ``ckpt_path="last"`` resume where PPO does.

    This is a collective for such a run. The latest state that the ranks have stored counts, and the
    checkpoints in the run directory, whatever folder Lightning has looked into.

    Args:
        trainer: Trainer of a fit, which owns its run directory and has loaded nothing yet.

    Raises:
        ValueError: If a checkpoint is not whole; raised on all ranks.
    """
    directory = run_directory(trainer)
    if directory is None or not resumes_last(trainer):
        return
    load_in_place_of_last(trainer, None)
    shared: tuple[str | None, str] | Exception | None = None
    if trainer.is_global_zero:
        try:
            start = find_start(trainer, "last", directory)
            if not start.is_file:
                start.write()
            shared = (start.path, start.said)
        except Exception as error:  # the other ranks are waiting
            shared = error
    ranks = Ranks(trainer.world_size)
    if ranks.size > 1:
        shared = trainer.strategy.broadcast(shared)
    if isinstance(shared, Exception):
        raise shared
    assert shared is not None
    path, said = shared
    if path is None or path == str(checkpoint_to_load(trainer)):
        return
    if trainer.is_global_zero and said:
        _log.warning(said)
    here = path if Path(path).is_file() else None
    if ranks.size > 1:
        SharedCheckpoint(trainer).share(ranks, here)
    if here is not None:
        load_in_place_of_last(trainer, here)


def _is_within(path: str, layout: RunLayout | None) -> bool:
    here = expand_home(path).absolute()
    return layout is not None and layout.directory in here.parents


def _version(directory: Path) -> int:
    number = directory.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1
