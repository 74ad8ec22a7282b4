"""The checkpoints from which the replay of a dead run can start."""

import atexit
import contextlib
import fcntl
import functools
import glob
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from esper_lightning.core.errors import require
from esper_lightning.forensics.deaths import failing_iteration
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import numbered_rows
from esper_lightning.forensics.remains import Remains
from esper_lightning.forensics.replay import judge
from esper_lightning.recorder.replay_watch import is_seeded, shuffles
from esper_lightning.training.checkpoint.files import read_checkpoint, write_checkpoint
from esper_lightning.training.checkpoint.kept import (
    KeptState,
    has_data_order,
    has_environments,
    iteration_in,
    latest_state,
)

__all__ = ["beginning", "find_starts", "state_in", "temporary_folder"]

_log = logging.getLogger(__name__)
_PREFIX = "esper-replay-"
_YOUNG_S = 60.0  # age of a folder that its process may not have locked yet


@contextlib.contextmanager
def temporary_folder() -> Generator[Path]:
    """A folder for files that a replay needs, removed at the end of the context.

    Folders of replays that were killed are removed as well. The process holds a lock on its folder,
    which the kernel takes away when the process ends.
    """
    for left in glob.glob(f"{glob.escape(tempfile.gettempdir())}/{_PREFIX}*"):  # noqa: PTH207
        with contextlib.suppress(OSError):
            lock = _lock(left)
            if time.time() - os.fstat(lock).st_mtime > _YOUNG_S:
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    folder, lock = tempfile.mkdtemp(prefix=_PREFIX), None
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            lock = _lock(folder)
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: str) -> int:
    """Lock a folder; returns the descriptor that holds the lock until it is closed.

    Raises:
        OSError: If another process holds the lock, or there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _stored(state: KeptState) -> Path:
    """A temporary file with a state that the ranks of a run have stored."""
    until_exit = contextlib.ExitStack()
    path = until_exit.enter_context(temporary_folder()) / "state.ckpt"
    atexit.register(until_exit.close)
    write_checkpoint(state.checkpoint, path)
    return path


def _order_of(loaders: Sequence[Any]) -> Callable[[Mapping[str, Any]], bool]:
    """A function that says whether a start from a checkpoint has the order of the data."""
    if not any(map(shuffles, loaders)):
        return has_data_order
    if is_seeded():  # so that the beginning has the order
        return functools.partial(has_data_order, begins_anew=False)
    return lambda _checkpoint: True  # nothing has it


def find_starts(
    directories: Sequence[Path],
    dead: Sequence[Remains],
    first: Remains,
    loaders: Sequence[Any] = (),
) -> dict[Path, int]:
    """Checkpoints that a replay can start from, each with its number of finished iterations.

    Those without the order of the data are the last resort: they can only repeat what the data do
    not decide.

    Raises:
        ValueError: If there is none, and the run has not begun at its first iteration.
    """
    has_order = _order_of(loaders)
    iteration, least = failing_iteration(first), 0
    if first.resumed_from is not None:  # a checkpoint may be older, as a best.ckpt that was copied
        rows = numbered_rows(RunLayout(first.directory).rank(first.rank).history)
        least = min(next((number for number, _ in rows), iteration), iteration) - 1
    starts: dict[Path, int] = {}
    others: dict[Path, int] = {}
    for path in _candidates(directories[0], dead, first):
        state = _usable(path)
        if state is not None and least <= state.iteration < iteration:
            (starts if has_order(state.checkpoint) else others)[path] = state.iteration
    starts |= _resumed_from(first)
    kept = latest_state(*directories, before=iteration, since_s=first.started_s)
    if kept is not None and has_environments(kept.checkpoint):
        of_kind = starts if has_order(kept.checkpoint) else others
        if kept.iteration > max(of_kind.values(), default=0):
            of_kind[_stored(kept)] = kept.iteration
    try:
        return starts or beginning(first)
    except ValueError:
        if others:
            return others
        raise


def beginning(first: Remains) -> dict[Path, int]:
    """The checkpoint that a run was resumed from; empty if the run was new.

    Raises:
        ValueError: If the checkpoint is not as it was.
    """
    starts = _resumed_from(first)
    if not starts and first.resumed_from is not None:
        rule = "be as it was when the run was resumed from it"
        hint = "It is gone, or was written again. Name a copy by --ckpt_path."
        require(False, "The start of the run", rule, first.resumed_from, hint)
    return starts


def _candidates(run_dir: Path, dead: Sequence[Remains], first: Remains) -> Iterator[Path]:
    """Checkpoints that a run has written, and those of its earlier replays that went as it did."""
    for path in sorted(RunLayout(run_dir).checkpoints.glob("*.ckpt")):
        if _is_written_by(first, path):  # and not left by an earlier run in the directory
            yield path
    absolute = run_dir.absolute()
    for directory in absolute.parent.glob(f"replay_of_{glob.escape(absolute.name)}*"):
        before = RunLayout(directory).before_fault
        if before.exists() and _went_alike(directory, dead):
            yield before


def _is_written_by(first: Remains, path: Path) -> bool:
    """Whether a file was written after the run of a rank began, as far as times are known."""
    return first.started_s is None or path.stat().st_mtime > first.started_s


def _went_alike(directory: Path, dead: Sequence[Remains]) -> bool:
    """Whether rows of a replay were compared, and it went as the run that died."""
    try:
        verdict = judge(directory, dead)
    except (ValueError, OSError):  # a replay of another run, or one that is under way
        return False
    return verdict.outcome not in ("different", "undecided") and verdict.rows > 0


def _resumed_from(first: Remains) -> dict[Path, int]:
    """The checkpoint that a run was resumed from, with its number of finished iterations.

    It may lack environments, as it did for the run. Empty if the run was new, or the file is gone
    or was written again.
    """
    if first.resumed_from is None:
        return {}
    path = Path(first.resumed_from)
    try:
        is_new = first.started_s is not None and _is_written_by(first, path)
        return {} if is_new else {path: iteration_in(read_checkpoint(path))}
    except (ValueError, OSError):
        return {}


def _usable(path: Path) -> KeptState | None:
    """The state in a checkpoint; ``None`` if no replay can start from it.

    A file that is no whole checkpoint of a run is a warning.
    """
    try:
        return state_in(path)
    except (ValueError, OSError) as error:
        _log.warning("%s is not used: %s", path, error)
        return None


def state_in(path: Path) -> KeptState | None:
    """The state in a checkpoint; ``None`` if it lacks environments.

    Raises:
        ValueError: If the file is no whole checkpoint, or its content is not that of a run.
    """
    checkpoint = read_checkpoint(path)
    try:
        iteration = iteration_in(checkpoint)
    except ValueError as error:
        message = f"ckpt_path must name a checkpoint of a run, got {str(path)!r}. {error}"
        raise ValueError(message) from error
    return KeptState(iteration, checkpoint) if has_environments(checkpoint) else None
