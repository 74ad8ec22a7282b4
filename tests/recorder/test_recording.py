"""A recording begins and ends as a whole."""

import os
import signal

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.recorder import recording
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
