"""The note on an error that names the places of its run's evidence."""

import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.report import Evidence
from esper_lightning.recorder.rescue import Rescue

__all__ = ["add_note", "where_evidence_is"]

_log = logging.getLogger(__name__)


_FULL = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: "A file has reached the limit of its size",
}


def add_note(error: BaseException, directory: Path, details: str) -> None:
    """Add a note with the places of the evidence; on stderr too if Python shows no traceback.

    Args:
        error: Error that ends the run.
        directory: Run directory.
        details: Places of the history, the report and the trace, in one line.

    On a full disk, a second note says so, and which checkpoints are there.
    """
    error.add_note(f"Run directory: {directory} ({details}). Shown by: esper crash {directory}")
    full = next(filter(_is_full, _chain(error)), None)
    if full is not None:
        names = [path.name for path in sorted(RunLayout(directory).checkpoints.glob("*.ckpt"))]
        kept = f"the checkpoints {', '.join(names)}" if names else "no file in checkpoints"
        where = f": {full.filename} was not written" if full.filename else ""
        error.add_note(f"{_FULL[full.errno or 0]}{where}. Kept: {kept}, and what is named above.")
    if isinstance(error, KeyboardInterrupt | SystemExit):
        _log.warning("%s: %s", type(error).__name__, error.__notes__[-1])


def _chain(error: BaseException | None) -> Iterator[OSError]:
    """The errors of the system among an error and those that have led to it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError):
            yield error
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context


def _is_full(error: OSError) -> bool:
    return error.errno in _FULL


def where_evidence_is(files: RankLayout, rescue: Rescue) -> str:
    """Places of the history, the report and the trace of a rank, in one line.

    Args:
        files: Files of the rank in the run directory.
        rescue: The rescue that has saved the evidence.
    """
    evidence, written = rescue.report.evidence, rescue.written
    history, trace = (evidence.get(name, Evidence()) for name in ("history", "trace"))
    rows = f"history in {files.history}"
    if history.state == "absent":
        rows = f"no history: {history.detail}"
    where = f"no trace: {trace.detail}"
    if trace.state == "saved" and trace.path is not None:
        where = f"trace in {files.directory / trace.path}"
    there = "nowhere: no place took it" if written is None else f"in {written}"
    return f"{rows}; report {there}; {where}"
