"""The note on an error that names the places of its run's evidence."""

import logging
from pathlib import Path

from esper_lightning.forensics.layout import RankLayout
from esper_lightning.forensics.report import Evidence
from esper_lightning.recorder.rescue import Rescue

__all__ = ["add_note", "where_evidence_is"]

_log = logging.getLogger(__name__)


def add_note(error: BaseException, directory: Path, details: str) -> None:
    """Add a note with the places of the evidence; on stderr too if Python shows no traceback.

    Args:
        error: Error that ends the run.
        directory: Run directory.
        details: Places of the history, the report and the trace, in one line.
    """
    error.add_note(f"Run directory: {directory} ({details}). Shown by: esper crash {directory}")
    if isinstance(error, KeyboardInterrupt | SystemExit):
        _log.warning("%s: %s", type(error).__name__, error.__notes__[-1])


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
