"""An error says where the evidence of its run is."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.report import CrashReport, Evidence
from esper_lightning.recorder.note import add_note, where_evidence_is

FILES = RunLayout(Path("run")).rank(0)


@pytest.mark.parametrize(
    ("kind", "lines"), [(ValueError, 0), (KeyboardInterrupt, 1), (SystemExit, 1)]
)
def test_the_note_is_in_the_log_where_python_shows_no_traceback(caplog, kind, lines):
    error = kind("x")
    add_note(error, Path("run"), "details")
    (note,) = error.__notes__
    assert note == "Run directory: run (details). Shown by: esper crash run"
    assert len(caplog.records) == lines


@pytest.mark.parametrize(
    ("trace", "written", "says"),
    [
        (Evidence(state="saved", path="trace/a"), FILES.crash, "trace in run/rank0/trace/a"),
        (Evidence(state="failed", detail="no room"), FILES.crash, "no trace: no room"),
        (Evidence(state="failed", detail="why"), None, "report nowhere: no place took it"),
    ],
)
def test_the_places_of_history_report_and_trace_are_named(trace, written, says):
    rescue = SimpleNamespace(report=CrashReport(evidence={"trace": trace}), written=written)
    places = where_evidence_is(FILES, rescue)
    assert places.startswith("history in run/rank0/history.jsonl; report ")
    assert says in places


def test_no_history_is_named_where_there_is_none():
    absent = Evidence(state="absent", detail="no iteration was finished")
    rescue = SimpleNamespace(report=CrashReport(evidence={"history": absent}), written=FILES.crash)
    places = where_evidence_is(FILES, rescue)
    assert places.startswith("no history: no iteration was finished; report in run/rank0/crash")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("is_cause", [False, True])
def test_the_last_line_about_a_full_disk_says_so_and_what_is_kept(tmp_path, number, is_cause):
    checkpoints = RunLayout(tmp_path).checkpoints
    checkpoints.mkdir()
    full = OSError(number, os.strerror(number), str(checkpoints / "best.ckpt"))
    error = RuntimeError("unexpected pos") if is_cause else full
    error.__context__ = full if is_cause else None
    add_note(error, tmp_path, "details")
    says = {errno.ENOSPC: "The disk is full: ", errno.EDQUOT: "The disk quota is used up: "}
    begin = says.get(number, "A file has reached the limit of its size: ")
    begin += f"{checkpoints / 'best.ckpt'} was not written. Kept: "
    assert error.__notes__[-1] == f"{begin}no file in checkpoints, and what is named above."
    (checkpoints / "last.ckpt").touch()
    add_note(error, tmp_path, "details")
    assert error.__notes__[-1] == f"{begin}the checkpoints last.ckpt, and what is named above."


def test_another_error_of_the_system_is_no_full_disk(tmp_path):
    error = OSError(errno.EACCES, "Permission denied", "x")
    add_note(error, tmp_path, "details")
    assert len(error.__notes__) == 1
