"""What launchers learn of a death: the error, and whether it is of use to start again.

``torchrun`` reads a file of each rank, Kubernetes a file of each container, and launchers that
start runs again can read the exit status. torch is imported only where ``torchrun`` asks for it.
"""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from esper_lightning.cli.errors import one_line
from esper_lightning.forensics.attempts import SAME_DEATH_STATUS, read_attempts, same_deaths
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.processes import identify, same_process
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.remains import rank_folders
from esper_lightning.forensics.report import CrashReport

__all__ = ["tell_launchers"]

_TERMINATION_LOG = Path("/dev/termination-log")
"""File that Kubernetes makes in each container, and shows after the container's end."""
_MOST_BYTES = 4096  # that Kubernetes reads of the file
_MOST_LINES = 12  # of a traceback


class _Recorded(NamedTuple):
    """The death of this process as its rank has recorded it."""

    files: RankLayout
    report: CrashReport
    attempts: int
    same: int
    """Attempts with this death, the present one included; 0 if none can be compared."""


def tell_launchers(execute: Callable[[], None], run_directory: Callable[[], Path | None]) -> None:
    """Execute a command, and tell launchers of the error that ends it.

    ``torchrun`` finds the error in ``TORCHELASTIC_ERROR_FILE``, and Kubernetes in its termination
    log. Where an earlier attempt in the run directory died of the same error in the same iteration,
    the exit status is 65: the next attempt would die in the same way.

    Args:
        execute: Command to execute.
        run_directory: Function that returns the directory of the run; ``None`` without one.
    """
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import record  # noqa: PLC0415

        execute = record(execute)
    try:
        execute()
    except BaseException as error:
        death = None
        with suppress(Exception):  # the error of the run is the one that must be seen
            death = _recorded(run_directory())
        if death is None:
            raise
        with suppress(OSError):
            _write_termination_log(error, death)
        if isinstance(error, SystemExit | KeyboardInterrupt) or death.same < 2:
            raise
        with suppress(OSError):
            replace(death.report, exit_status=SAME_DEATH_STATUS).write(death.files.crash)
        sys.excepthook(type(error), error, error.__traceback__)
        if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison] - may be closed
            print(f"esper: {_again(death)} The next would, too.", file=sys.stderr)
        sys.exit(SAME_DEATH_STATUS)


def _recorded(directory: Path | None) -> _Recorded | None:
    """The death of this process; ``None`` where it is not on record."""
    if directory is None:
        return None
    me = identify(os.getpid())
    for rank in rank_folders(directory):
        files = RunLayout(directory).rank(rank)
        process, report = ProcessRecord.read(files.process), CrashReport.read(files.crash)
        if process is None or process.pid is None or not same_process(process, me):
            continue
        if process.state == "failed" and report is not None:
            attempts = read_attempts([directory])
            return _Recorded(files, report, len(attempts), same_deaths(attempts))
    return None


def _again(death: _Recorded) -> str:
    where = "before the first iteration"
    if death.report.iteration:
        where = f"in iteration {death.report.iteration}"
    return f"{death.same} attempts have died {where} of the same error."


def _write_termination_log(error: BaseException, death: _Recorded) -> None:
    """Write the death where Kubernetes looks for it.

    A rank that only lost a peer does not replace what that peer wrote in the same container.
    """
    path, report = _TERMINATION_LOG, death.report
    if not path.is_file() or (report.cause == "peer" and path.stat().st_size > 0):
        return
    begin = one_line(
        f"Rank {report.rank} died in iteration {report.iteration}: {report.what_happened}", 1000
    )
    lines = [begin, f"Attempt {death.attempts} in {death.files.directory.parent}."]
    lines += [_again(death)] if death.same > 1 else []
    trace = "".join(traceback.format_exception(error)).splitlines()
    text = "\n".join([*lines, *trace[-_MOST_LINES:]])
    path.write_bytes(text.encode(errors="replace")[:_MOST_BYTES])
