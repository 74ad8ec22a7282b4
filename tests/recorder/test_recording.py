"""A recording begins and ends as a whole."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder, LastCheckpoint
from esper_lightning.forensics.claims import DirectoryInUseError, claim
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.recorder import recording
from esper_lightning.recorder.peers import Peers
from esper_lightning.training.checkpoint.files import AtomicCheckpointIO
from tests.recorder.test_flight_recorder import Plain, raise_at
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


class TestAnotherRunTakesTheNameOfTheDirectoryOfALivingOne:
    """The directory is moved after the first batch; files of another run are then in its place."""

    @pytest.fixture
    def fit(self, make_trainer, tmp_path):
        run = RunLayout(tmp_path / "run")
        theirs = {}

        def replace(*_):
            if theirs:
                return
            run.directory.rename(tmp_path / "moved")
            another = claim(run.directory)
            files = run.rank(0)
            files.directory.mkdir()
            run.checkpoints.mkdir()
            paths = [files.process, files.crash, files.crash_checkpoint, run.last_checkpoint]
            for path in (*paths, *files.states, files.directory / ".reserved.0"):
                path.write_text("theirs")
            another.release()
            theirs.update(self.files_in(run.directory))

        def fit(module, *callbacks, **settings):
            mover = Callback()
            mover.on_train_batch_end = replace
            recorder = FlightRecorder(run.directory, watch=False, keeps_state=True)
            trainer = make_trainer(
                callbacks=[recorder, mover, *callbacks],
                plugins=[AtomicCheckpointIO()],
                max_epochs=1,
                **settings,
            )
            try:
                trainer.fit(module, DataLoader(torch.ones(3, 4)))
            finally:
                assert self.files_in(run.directory) == theirs

        return fit

    @pytest.fixture
    def moved(self, tmp_path):
        return RunLayout(tmp_path / "moved").rank(0)

    @staticmethod
    def files_in(folder):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    def test_evidence_of_a_death_is_in_the_moved_directory(self, fit, moved):
        with pytest.raises(RuntimeError, match="injected") as caught:
            fit(Plain(raise_at(2)))
        assert f"esper crash {moved.directory.parent}" in caught.value.__notes__[0]
        assert read_report(moved.crash)["evidence"]["checkpoint"]["path"] == "crash.ckpt"
        assert moved.crash_checkpoint.exists()
        assert ProcessRecord.load(moved.process).state == "failed"

    def test_a_run_that_ends_well_says_so_in_the_moved_directory(self, fit, moved):
        fit(Plain())
        assert ProcessRecord.load(moved.process).state == "finished"
        assert not any(path.exists() for path in moved.states)

    def test_a_checkpoint_is_refused(self, fit, moved):
        with pytest.raises(DirectoryInUseError, match="another run took its name"):
            fit(Plain(), LastCheckpoint(), enable_checkpointing=True)
        assert read_report(moved.crash)["cause"] == "exception"
