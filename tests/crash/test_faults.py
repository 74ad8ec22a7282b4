"""Every fault, in a process of its own, leaves its evidence on disk."""

import os
import re
from pathlib import Path

import pytest
import torch

from esper_lightning.forensics.remains import examine
from tests.crash.cases import (
    ALL,
    ON_GPU,
    QUICK,
    Case,
    Expected,
    expected,
    has_closed_window,
    has_open_window,
    name,
)
from tests.crash.harness import FAILING_OPERATOR, Outcome, run
from tests.reports import read_report

pytestmark = pytest.mark.crash
_MORE = [case for case in ALL if case not in QUICK]


def check(case: Case, outcome: Outcome) -> list[str]:
    """Faults in the files that a run left."""
    due, report = expected(case), outcome.report()
    if case.get("again"):  # the second run put the first one's report aside
        if report is not None:
            return ["a report of a run that did not die"]
        report = read_report(outcome.rank().crash.with_suffix(".json.1"))
    if report is None:
        return ["no report"]
    error = report["error"] or {}
    evidence = report["evidence"]
    error_type = error.get("type")
    if case.get("workers") and f"{error_type}: " in outcome.stderr:
        error_type = due.error  # torch raises what it meets first of a worker that is gone
    found = {
        "exit status": (outcome.status, due.status),
        "cause": (report["cause"], due.cause),
        "error": (error_type, due.error),
        "complete": (report["complete"], True),
        "history": (outcome.rows(), list(range(1, outcome.truth() + 1))),
        "trace": (any(FAILING_OPERATOR in t for t in outcome.traces()), due.trace),
        "trace in report": (evidence["trace"]["state"], _state_of_trace(case, due)),
        "why no trace": (bool(evidence["trace"]["detail"]), True),
        "left over": (outcome.leftovers, []),
    }
    if has_closed_window(case):
        shown = [window.was_open for window in examine(outcome.directory)[0].windows]
        found["closed window"] = (shown, [False])
    if due.cause == "vanished" and case.get("limit", 1 << 20) > 300_000:
        had = (report["memory"] or {}).get("rss_bytes", 0)
        found["memory"] = (50e6 < had < 50e9, True)
        found["memory in words"] = (f"it had {had / 1e9:.2f} GB" in error["message"], True)
    if case.get("logger"):
        found["logger"] = (evidence["loggers"]["state"], "failed")
    state = outcome.state()
    if due.cause in ("exception", "signal") and due.error is not None:
        found["still profiling"] = (state.get("profiling"), False)
        found["threads"] = (state.get("threads"), [])
        found["handlers"] = (state.get("handlers"), [])
        notes = " ".join(state.get("notes", []))
        found["note"] = (str(outcome.directory) in notes, True)
        if case.get("site", "training_step") == "training_step":
            found["phases"] = (any("training_step" in p for p in report["phases"]), True)
    if case.get("again"):
        del found["history"]  # both runs' steps are in it
        found["second fit"] = (state.get("again"), 24)
    return [f"{k}: {seen!r}, not {right!r}" for k, (seen, right) in found.items() if seen != right]


def _state_of_trace(case: Case, due: Expected) -> str:
    workers_window = case.get("workers") and has_open_window(case)
    return "saved" if due.trace or workers_window else "absent"


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_evidence_of(case, tmp_path):
    outcome = run(case, tmp_path)
    assert not check(case, outcome), outcome.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("case", _MORE, ids=name)
def test_more_evidence_of(case, tmp_path):
    outcome = run(case, tmp_path)
    assert not check(case, outcome), outcome.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ON_GPU, ids=name)
def test_evidence_on_a_gpu_of(case, tmp_path):
    outcome = run(case, tmp_path)
    assert not check(case, outcome), outcome.stderr[-3000:]


def test_a_hang_is_on_record_and_the_run_goes_on(tmp_path):
    outcome = run({"fault": "hang", "profiler": "always", "hang_timeout_s": 1.0}, tmp_path)
    assert outcome.status == 0, outcome.stderr[-3000:]
    report = outcome.report()
    assert report["cause"] == "hang"
    assert report["complete"]
    assert "No iteration has ended for" in outcome.rank().stacks.read_text()
    assert any(FAILING_OPERATOR in trace for trace in outcome.traces())
    assert outcome.rows() == list(range(1, 25))
    assert outcome.leftovers == []


@pytest.mark.parametrize("before", ["handler in C", "ignored"])
def test_sigterm_ends_a_run_at_once_whatever_lightning_has_replaced(tmp_path, before):
    outcome = run({"fault": "SIGTERM", "before": before}, tmp_path)
    assert outcome.status == 143, outcome.stderr[-3000:]
    assert "Received SIGTERM" not in outcome.stderr  # by Lightning, which waits for the batch
    assert outcome.report()["cause"] == "signal"
    assert outcome.state()["handlers"] == []


def test_a_logger_ends_no_run(tmp_path):
    outcome = run({"fault": "RuntimeError", "site": "logger"}, tmp_path)
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert outcome.report() is None
    assert outcome.rows() == list(range(1, 25))


def test_without_any_room_the_error_comes_through_and_the_history_stays(tmp_path):
    outcome = run({"fault": "no room at all", "profiler": "always"}, tmp_path)
    assert outcome.status == 1
    assert "RuntimeError: injected" in outcome.stderr
    assert outcome.rows() == list(range(1, outcome.truth() + 1))
    assert outcome.leftovers == []


def test_without_its_directory_the_report_goes_elsewhere_and_the_note_says_where(tmp_path):
    outcome = run({"fault": "directory gone", "profiler": "always"}, tmp_path)
    assert outcome.status == 1
    assert "RuntimeError: injected" in outcome.stderr
    assert outcome.leftovers == []
    place = Path(re.search(r"report in (\S+\.json)", outcome.stderr)[1])
    assert read_report(place)["error"]["message"] == "injected"
    place.unlink()


def test_a_death_after_a_hang_has_a_report_of_its_own(tmp_path):
    outcome = run(
        {"fault": "hang, then raise", "profiler": "always", "hang_timeout_s": 1.0}, tmp_path
    )
    assert outcome.status == 1
    assert read_report(outcome.rank().crash.with_suffix(".json.1"))["cause"] == "hang"
    report = outcome.report()
    assert (report["cause"], report["error"]["message"]) == ("exception", "injected")
    assert "off by then" in report["evidence"]["trace"]["detail"]
    assert any(FAILING_OPERATOR in trace for trace in outcome.traces())


def test_the_handler_of_pythonfaulthandler_has_the_last_word(tmp_path):
    outcome = run({"fault": "segfault", "environment": {"PYTHONFAULTHANDLER": "1"}}, tmp_path)
    assert outcome.status == -11
    assert "Fatal Python error: Segmentation fault" in outcome.stderr
    assert outcome.report()["cause"] == "native"


def test_where_lightning_requeues_a_slurm_job_its_signal_does_so(tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    scontrol.chmod(0o755)
    outcome = _run_in_slurm("SIGUSR1, and on", tmp_path / "run", path=scontrol.parent)
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert outcome.report() is None
    assert outcome.rows() == list(range(1, 25))
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert list(outcome.directory.glob("hpc_ckpt_*.ckpt"))


def test_where_lightning_requeues_a_slurm_job_it_ends_a_terminated_run_itself(tmp_path):
    outcome = _run_in_slurm("SIGTERM, and on", tmp_path / "run", path=tmp_path)
    assert outcome.status == 0, outcome.stderr[-3000:]  # at the end of the batch, as without us
    report = outcome.report()
    assert (report["cause"], report["error"]["type"]) == ("signal", "SIGTERMException")
    assert outcome.rows() == list(range(1, 8))  # with the batch in which it came


def _run_in_slurm(fault: str, directory: Path, *, path: Path) -> Outcome:
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1"}
    job |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "localhost"}
    environment = {f"SLURM_{name}": value for name, value in job.items()}
    environment["PATH"] = f"{path}:{os.environ['PATH']}"
    outcome = run({"fault": fault, "environment": environment}, directory)
    assert outcome.leftovers == []
    return outcome
