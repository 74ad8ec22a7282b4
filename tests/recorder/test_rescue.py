"""The rescue takes every step, whatever one of them does, and reports the outcome of each."""

import threading
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch.profilers import PassThroughProfiler

from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.rank_record import RankRecord
from esper_lightning.recorder import rescue
from esper_lightning.recorder.death import Death
from esper_lightning.recorder.evidence_steps import EvidenceStep, StepOutcome
from esper_lightning.recorder.rescue import Rescue
from tests.reports import read_report

DEATH = Death(cause="exception", error=RuntimeError("injected"))


@pytest.fixture
def make(make_trainer, files, monkeypatch):
    """Make a rescue whose only steps are those given."""
    trainer, ring = make_trainer(), PhaseRing(files.phases)

    def make(*steps, callbacks=(), bounded=True):
        monkeypatch.setattr(rescue, "STEPS", steps)
        return Rescue(
            trainer=trainer,
            files=files,
            ring=ring,
            guard=SimpleNamespace(profiler=PassThroughProfiler()),
            print_profile=False,
            process=RankRecord(started_s=1.0),
            callbacks=lambda: callbacks,
            bounded=bounded,
        )

    yield make
    ring.close()


def saved(run):
    return StepOutcome("saved", run.files.history, "1 row")


def raises(error):
    def save(run):
        raise error

    return save


def test_the_outcome_of_each_step_is_in_the_report(make, files):
    steps = [
        EvidenceStep("one", saved, None),
        EvidenceStep("not needed", saved, None, when=lambda run: False),
        EvidenceStep("silent", lambda run: None, None),
    ]
    make(*steps).run(DEATH)
    report = read_report(files.crash)
    entry = {"state": "saved", "path": "history.jsonl", "detail": "1 row"}
    assert report["evidence"] == {"one": entry}
    assert report["complete"]
    assert report["error"]["message"] == "injected"
    assert report["started_s"] == 1.0


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3), KeyboardInterrupt()])
def test_a_step_that_raises_costs_no_other(make, files, error):
    steps = [EvidenceStep("bad", raises(error), None), EvidenceStep("good", saved, None)]
    make(*steps).run(DEATH)
    evidence = read_report(files.crash)["evidence"]
    assert evidence["bad"]["state"] == "failed"
    assert evidence["bad"]["detail"].startswith(type(error).__name__)
    assert evidence["good"]["state"] == "saved"


def test_a_step_whose_need_cannot_be_known_is_reported_and_not_taken(make, files):
    taken = []
    make(EvidenceStep("odd", taken.append, None, when=lambda run: 1 / 0)).run(DEATH)
    assert read_report(files.crash)["evidence"]["odd"]["detail"] == (
        "ZeroDivisionError: division by zero"
    )
    assert taken == []


def test_a_step_that_is_late_is_reported_and_left_behind(make, files):
    ended = threading.Event()
    steps = [
        EvidenceStep("slow", lambda run: ended.wait(60) and None, 0.2),
        EvidenceStep("good", saved, 5),
    ]
    started = time.monotonic()
    try:
        make(*steps).run(DEATH)
    finally:
        ended.set()
    assert time.monotonic() - started < 30
    evidence = read_report(files.crash)["evidence"]
    assert evidence["slow"]["detail"] == "not done within 0.2 s"
    assert evidence["good"]["state"] == "saved"


@pytest.mark.parametrize("bounded", [True, False])
def test_steps_have_threads_only_where_they_may_have_them(make, bounded):
    threads = []
    step = EvidenceStep("one", lambda run: threads.append(threading.get_ident()), 5)
    make(step, bounded=bounded).run(DEATH)
    assert (threads == [threading.get_ident()]) == (not bounded)


def test_callbacks_are_not_asked_where_no_step_may_have_a_thread(make):
    asked = []

    class Holds:
        def save_evidence(self, directory, death):
            asked.append(death)

    for bounded in (False, True):
        make(callbacks=[Holds()], bounded=bounded).run(DEATH)
        assert len(asked) == bounded


def test_a_report_that_its_folder_does_not_take_goes_elsewhere(make, files, tmp_path, monkeypatch):
    monkeypatch.setattr(rescue.tempfile, "gettempdir", lambda: str(tmp_path))
    files.crash.mkdir()
    made = make()
    made.run(DEATH)
    assert made.written.parent == tmp_path
    assert read_report(made.written)["error"]["message"] == "injected"


def test_an_error_that_comes_later_is_added_once_and_replaces_none(make, files):
    made = make()
    made.amend(ValueError("before any death"))
    assert not files.crash.exists()
    made.run(Death(cause="signal", signal="SIGTERM"))
    for error in (SystemExit(143), ValueError("later")):
        made.amend(error)
    report = read_report(files.crash)
    assert report["cause"] == "signal"
    assert report["error"]["type"] == "SystemExit"
    assert report["exit_status"] == 143


def test_a_step_counts_as_progress(make):
    before, seen = [], []
    made = make(
        EvidenceStep("one", lambda run: before.append(made.progress_s), None),
        EvidenceStep("two", lambda run: seen.append(made.progress_s), None),
    )
    made.run(DEATH)
    assert made.begun_s < before[0] < seen[0]
