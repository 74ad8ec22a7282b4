"""Evidence of a user's callbacks and modules is saved at a death, and costs no other evidence."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback

from esper_lightning import FlightRecorder
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.recorder import rescue
from esper_lightning.recorder.evidence import SENTENCE_LENGTH, Death, HoldsEvidence
from esper_lightning.recorder.evidence_steps import steps_of_holders
from tests import forked
from tests.recorder import test_flight_recorder
from tests.recorder.test_flight_recorder import Plain, raise_at
from tests.recorder.test_signals import kill_at
from tests.reports import read_report

fit, files = test_flight_recorder.fit, test_flight_recorder.files


class Diary(Callback):
    """A callback that writes into the given directory, and stores the death."""

    def __init__(self):
        self.deaths = []

    def save_evidence(self, directory, death):
        self.deaths.append(death)
        (directory / "diary.txt").write_text("dear diary")
        return "one page"


class Silent(Callback):
    def save_evidence(self, directory, death):
        return None


class Fails(Callback):
    def save_evidence(self, directory, death):
        raise LookupError("the diary is lost")


class Exits(Callback):
    def save_evidence(self, directory, death):
        raise SystemExit(3)


class Hangs(Callback):
    def __init__(self, *, writes=False):
        self.ended, self.writes = threading.Event(), writes

    def save_evidence(self, directory, death):
        if self.writes:
            (directory / "half.txt").write_text("half")
        self.ended.wait(60)


class FailsLate(Callback):
    def save_evidence(self, directory, death):
        (directory / "half.txt").write_text("half")
        raise LookupError("the other half is lost")


class Talks(Callback):
    def save_evidence(self, directory, death):
        return "a long\nstory " + "on" * 1000


def evidence_of(files):
    report = read_report(files.crash)
    assert report["complete"]
    return report["evidence"]


SAVED = {"state": "saved", "path": "evidence/Diary", "detail": "one page"}


@pytest.mark.parametrize(
    ("act", "cause"),
    [(raise_at(3), "exception"), (kill_at(3, signal.SIGTERM), "signal")],
    ids=["exception", "SIGTERM"],
)
def test_of_a_callback_is_in_the_report_and_on_disk(fit, files, act, cause):
    diary = Diary()
    assert isinstance(diary, HoldsEvidence)
    fit(Plain(act), callbacks=[FlightRecorder(watch=False), diary])
    assert evidence_of(files)["Diary"] == SAVED
    assert (files.evidence / "Diary" / "diary.txt").read_text() == "dear diary"
    (death,) = diary.deaths
    assert isinstance(death, Death)
    assert death.cause == cause


def test_of_the_module_is_saved_too(fit, files):
    class Holds(Plain):
        def save_evidence(self, directory, death):
            (directory / "weights.txt").write_text(str(death.reason))
            return "weights"

    fit(Holds(raise_at(3)))
    assert evidence_of(files)["Holds"]["path"] == "evidence/Holds"
    text = (files.evidence / "Holds" / "weights.txt").read_text()
    assert text == "RuntimeError: injected"


def test_of_a_callback_that_another_one_replaced_is_saved(fit, files):
    class Replaces(Callback):
        def on_train_batch_start(self, trainer, *_):
            trainer.callbacks = [Callback()]

    fit(Plain(raise_at(3)), callbacks=[FlightRecorder(watch=False), Diary(), Replaces()])
    assert evidence_of(files)["Diary"] == SAVED


def test_of_two_callbacks_of_one_class_is_in_two_folders(fit, files):
    fit(Plain(raise_at(3)), callbacks=[FlightRecorder(watch=False), Diary(), Diary()])
    evidence = evidence_of(files)
    assert evidence["Diary"] == SAVED
    assert evidence["Diary-2"] == {**SAVED, "path": "evidence/Diary-2"}


def test_of_two_classes_of_one_name_has_two_names():
    kinds = [type("Twin", (Silent,), {"__module__": module}) for module in ("one", "other")]
    of_the_recorder = type("history", (Silent,), {})
    callbacks = [*(kind() for kind in kinds), of_the_recorder()]
    run = SimpleNamespace(
        callbacks=lambda: callbacks,
        trainer=SimpleNamespace(lightning_module=None),
        files=RankLayout(Path()),
    )
    assert [step.name for step in steps_of_holders(run)] == ["Twin", "Twin-2", "history-2"]


def test_that_fails_is_in_the_report_and_costs_no_other(fit, files):
    callbacks = [FlightRecorder(watch=False), Fails(), Exits(), Silent(), Diary()]
    assert str(fit(Plain(raise_at(3)), callbacks=callbacks)) == "injected"
    evidence = evidence_of(files)
    detail = "LookupError: the diary is lost"
    assert evidence["Fails"] == {"state": "failed", "path": None, "detail": detail}
    assert evidence["Exits"]["detail"] == "SystemExit: 3"
    detail = "it had nothing to save"
    assert evidence["Silent"] == {"state": "absent", "path": None, "detail": detail}
    assert evidence["Diary"] == SAVED
    assert [path.name for path in files.evidence.iterdir()] == ["Diary"]
    for name in ("history", "checkpoint"):
        assert evidence[name]["state"] == "saved"


def test_that_hangs_is_in_the_report_and_costs_no_other(fit, files, monkeypatch):
    monkeypatch.setattr(rescue, "HOLDER_S", 0.5)
    hangs, diary = Hangs(), Diary()
    started = time.monotonic()
    try:
        error = fit(Plain(raise_at(3)), callbacks=[FlightRecorder(watch=False), hangs, diary])
        assert str(error) == "injected"
        assert time.monotonic() - started < 30
    finally:
        hangs.ended.set()
    evidence = evidence_of(files)
    detail = "not done within 0.5 s"
    assert evidence["Hangs"] == {"state": "failed", "path": None, "detail": detail}
    assert evidence["Diary"] == SAVED


def test_of_a_callback_that_fails_or_is_late_is_found_by_the_report(fit, files, monkeypatch):
    monkeypatch.setattr(rescue, "HOLDER_S", 0.5)
    hangs = Hangs(writes=True)
    try:
        fit(Plain(raise_at(3)), callbacks=[FlightRecorder(watch=False), FailsLate(), hangs])
    finally:
        hangs.ended.set()
    evidence = evidence_of(files)
    for name in ("FailsLate", "Hangs"):
        assert evidence[name]["state"] == "failed"
        assert evidence[name]["path"] == f"evidence/{name}"
        assert [each.name for each in (files.evidence / name).iterdir()] == ["half.txt"]
    assert evidence["FailsLate"]["detail"] == "LookupError: the other half is lost"


def test_that_tells_a_long_story_is_cut_to_a_line(fit, files):
    fit(Plain(raise_at(3)), callbacks=[FlightRecorder(watch=False), Talks()])
    said = evidence_of(files)["Talks"]["detail"]
    assert said.startswith("a long story ononon")
    assert said.endswith("on...")
    assert len(said) == SENTENCE_LENGTH


def test_of_many_callbacks_that_hang_shares_one_time_budget(fit, files, monkeypatch):
    monkeypatch.setattr(rescue, "HOLDER_S", 0.5)
    monkeypatch.setattr(rescue, "ALL_HOLDERS_S", 0.8)
    hanging = [Hangs() for _ in range(3)]
    try:
        fit(Plain(raise_at(3)), callbacks=[FlightRecorder(watch=False), *hanging, Diary()])
    finally:
        for each in hanging:
            each.ended.set()
    evidence = evidence_of(files)
    assert evidence["Hangs"]["detail"] == "not done within 0.5 s"
    assert evidence["Hangs-2"]["detail"].startswith("not done within 0.")
    for name in ("Hangs-3", "Diary"):
        detail = "not asked: others took all of the 0.8 s"
        assert evidence[name] == {"state": "failed", "path": None, "detail": detail}


PROGRAM = """
import os, signal, sys, time
from lightning.pytorch import Callback, Trainer
from esper_lightning import FlightRecorder
from tests.recorder.test_flight_recorder import Plain, data, raise_at

class Hangs(Callback):
    def save_evidence(self, directory, death):
        open(sys.argv[1] + "/asked", "x").close()
        time.sleep(60)

Trainer(
    accelerator="cpu", max_epochs=1, logger=False, default_root_dir=sys.argv[1],
    callbacks=[FlightRecorder(sys.argv[1], watch=False), Hangs()],
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
).fit(Plain(raise_at(3)), data())
"""


@pytest.mark.crash
def test_of_the_recorder_is_reported_though_a_callback_hangs_until_sigkill(files):
    directory = files.directory.parent
    with (directory / "output").open("wb") as output:
        process = forked.start(["-c", PROGRAM, directory], output=output)
    end = time.monotonic() + 60
    while not (directory / "asked").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    report = read_report(files.crash)
    assert not report["complete"]
    assert report["error"]["message"] == "injected"
    states = {name: entry["state"] for name, entry in report["evidence"].items()}
    assert states == {
        "history": "saved",
        "loggers": "saved",
        "trace": "absent",
        "checkpoint": "saved",
        "minibatch": "absent",
        "Hangs": "pending",
    }


def test_comes_after_the_recorders_own(fit, files):
    seen = []

    class Looks(Callback):
        def save_evidence(self, directory, death):
            seen.append(read_report(files.crash))
            assert files.crash_checkpoint.exists()
            os.kill(os.getpid(), signal.SIGUSR1)  # of a user's code, anything may come

    error = fit(Plain(raise_at(3)), callbacks=[FlightRecorder(watch=False), Looks()])
    assert str(error) == "injected"
    assert seen[0]["error"]["message"] == "injected"
    assert evidence_of(files)["Looks"]["state"] == "absent"


def test_of_an_earlier_run_is_renamed_and_a_few_are_kept(fit, files):
    theirs = files.directory / "evidence.2"
    for number in range(13):
        if number == 3:  # in the place of one of ours
            shutil.rmtree(theirs)
            theirs.mkdir()
            (theirs / "notes.txt").touch()
            shutil.copytree(files.directory / "evidence.1", files.directory / "evidence.0")
        recorder = FlightRecorder(files.directory.parent, watch=False)
        fit(Plain(raise_at(0)), callbacks=[recorder, Diary()])
    fit(Plain(), recorder=FlightRecorder(files.directory.parent, watch=False))
    assert not files.evidence.exists()
    left = {int(path.suffix[1:]) for path in files.directory.glob("evidence.*")}
    assert left == {0, 2, *range(4, 14)}
    assert (theirs / "notes.txt").exists()


def test_of_a_run_without_a_death_is_not_asked_for(fit, files):
    diary = Diary()
    assert fit(Plain(), callbacks=[FlightRecorder(watch=False), diary]) is None
    assert diary.deaths == []
    assert not files.evidence.exists()
