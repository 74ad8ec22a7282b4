"""A recording begins and ends as a whole."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.recorder import recording
from esper_lightning.recorder.peers import Peers
from tests.recorder.test_flight_recorder import Plain
from tests.reports import read_report


@pytest.mark.parametrize("step", ["ProfilerGuard", "Watchdog"])
def test_a_signal_while_a_recording_begins_is_recorded_and_everything_is_restored(
    make_trainer, tmp_path, monkeypatch, step
):
    true = getattr(recording, step)

    def interrupted(*args, **kwargs):
        built = true(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return built

    monkeypatch.setattr(recording, step, interrupted)
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(callbacks=[FlightRecorder(tmp_path / "run", watch=False)])
    with pytest.raises(SIGTERMException):
        trainer.fit(Plain(), DataLoader(torch.ones(3, 4)))
    report = read_report(RunLayout(tmp_path / "run").rank(0).crash)
    assert (report["cause"], report["signal"]) == ("signal", "SIGTERM")
    assert "start" not in vars(trainer.profiler)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_launcher_that_ends_the_rest_is_not_the_cause_when_a_rank_is_gone(
    make_trainer, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(Peers, "first_vanished", lambda _: (1, "its process vanished"))

    class Stopped(Callback):
        def on_train_batch_end(self, *_):
            os.kill(os.getpid(), signal.Signals[name])

    trainer = make_trainer(callbacks=[FlightRecorder(tmp_path / "run"), Stopped()])
    with pytest.raises((SIGTERMException, SystemExit, KeyboardInterrupt)):
        trainer.fit(Plain(), DataLoader(torch.ones(3, 4)))
    report = read_report(RunLayout(tmp_path / "run").rank(0).crash)
    of_peer = ("peer", {"rank": 1, "reason": "its process vanished"})
    expected = of_peer if name == "SIGTERM" else ("signal", None)
    assert (report["cause"], report["peer"]) == expected
    assert report["signal"] == name
