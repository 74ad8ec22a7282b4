"""The note on an error that says where the evidence of its run is."""

import logging
from pathlib import Path

from esper_lightning.forensics.layout import RankLayout
from esper_lightning.forensics.report import Evidence
from esper_lightning.recorder.rescue import Rescue

__all__ = ["add_note", "where_evidence_is"]

_log = logging.getLogger(__name__)


def add_note(error: BaseException, directory: Path, details: str) -> None:
    """Add a note that says where to look; on stderr too for errors that Python does not show.

    Args:
        error: Error that ends the run.
        directory: Run directory.
        details: Where history, report and trace are.
    """
    error.add_note(f"Run directory: {directory} ({details}). Shown by: esper crash {directory}")
    if isinstance(error, KeyboardInterrupt | SystemExit):
        _log.warning("%s: %s", type(error).__name__, error.__notes__[-1])


def where_evidence_is(files: RankLayout, rescue: Rescue) -> str:
    """Where history, report and trace of a rank are, in a line."""
    report, written = rescue.report, rescue.written
    trace = report.evidence.get("trace", Evidence())
    where = f"no trace: {trace.detail}"
    if trace.state == "saved" and trace.path is not None:
        where = f"trace in {files.directory / trace.path}"
    there = "nowhere: no place took it" if written is None else f"in {written}"
    return f"history in {files.history}; report {there}; {where}"
