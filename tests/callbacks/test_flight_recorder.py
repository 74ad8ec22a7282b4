"""The flight recorder in the process of the tests; ``tests/crash`` lets whole processes die."""

import contextlib
import gc
import gzip
import os
import signal
import threading
import time
import weakref

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.profilers import PyTorchProfiler
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder
from esper_lightning.callbacks import profiler_rescue, recording, rescue
from esper_lightning.callbacks.recording import Recording
from esper_lightning.callbacks.window_profiler import WindowProfiler
from esper_lightning.core.validate import NonFiniteError
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.report import read_report, reserve_room, write_report
from esper_lightning.forensics.sidecar import complete_report
from tests.disks import fill


def schedule(wait, warmup=0):
    return torch.profiler.schedule(wait=wait, warmup=warmup, active=1)


class Plain(LightningModule):
    """Calls ``act(module, batch_idx)`` in every step."""

    def __init__(self, act=None):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.act = act or (lambda *_: None)

    def training_step(self, batch, batch_idx):
        self.act(self, batch_idx)
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


def data(rows=6):
    return DataLoader(torch.ones(rows, 4))


def raise_at(step, error=None):
    def act(module, batch_idx):
        if batch_idx == step:
            raise error or RuntimeError("injected")

    return act


@pytest.fixture
def files(tmp_path):
    return RunLayout(tmp_path).rank(0)


@pytest.fixture
def fit(make_trainer):
    """Fit with a recorder that starts no second process; returns the error."""

    def fit(module, *loaders, recorder=None, **settings):
        recorder = recorder or FlightRecorder(watch=False)
        defaults = {"max_epochs": 1, "callbacks": [recorder]}
        trainer = make_trainer(**{**defaults, **settings})
        try:
            if loaders and isinstance(loaders[0], LightningDataModule):
                trainer.fit(module, datamodule=loaders[0])
            else:
                trainer.fit(module, *(loaders or (data(),)))
        except BaseException as error:
            return error
        return None

    return fit


class TestNothingIsComputed:
    def test_metrics_of_the_epoch_stay_as_they_are(self, fit, files):
        computed = []

        class Mean(torchmetrics.MeanMetric):
            def compute(self):
                computed.append(True)  # under ddp it would wait for the other ranks
                return super().compute()

        def act(module, batch_idx):
            module.mean.update(1.0)
            module.log("mean", module.mean, on_step=False, on_epoch=True)

        class Epoch(Plain):
            def on_train_epoch_end(self):
                raise RuntimeError("injected")

        module = Epoch(act)
        module.mean = Mean()
        assert str(fit(module)) == "injected"
        assert computed == []
        assert list(read_report(files.crash)["metrics"]) == ["loss"]


class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class TestOneFieldDoesNotTakeTheReport:
    def test_an_error_that_cannot_be_shown(self, fit, files):
        assert isinstance(fit(Plain(raise_at(3, UnspeakableError()))), UnspeakableError)
        report = read_report(files.crash)
        assert report["complete"]
        assert report["error"]["type"] == "UnspeakableError"
        assert report["evidence"]["checkpoint"]["state"] == "saved"

    def test_a_counter_that_raises(self, fit, files):
        class Odd(Plain):
            @property
            def env_steps(self):
                raise ValueError("not yet")

        fit(Odd(raise_at(3)))
        report = read_report(files.crash)
        assert (report["complete"], report["iteration"]) == (True, 4)

    def test_whatever_fails_the_next_steps_are_taken(self, fit, files, monkeypatch):
        monkeypatch.setattr(rescue, "describe", lambda *_: 1 / 0)
        fit(Plain(raise_at(3)), profiler=PyTorchProfiler(schedule=None))
        report = read_report(files.crash)
        assert (report["cause"], report["complete"]) == ("exception", True)
        assert report["evidence"]["death"]["state"] == "failed"
        for name in ("history", "checkpoint", "trace"):
            assert report["evidence"][name]["state"] == "saved"


def test_a_run_that_ended_is_not_kept(make_trainer):
    kept = []
    for _ in range(2):
        trainer, module = make_trainer(max_epochs=1, callbacks=[FlightRecorder()]), Plain()
        trainer.fit(module, data())
        kept += [weakref.ref(trainer), weakref.ref(module)]
        del trainer, module
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4


class Early(LightningDataModule):
    """Dies before any callback is asked to set up."""

    def __init__(self, dies=True):
        super().__init__()
        self.dies = dies

    def prepare_data(self):
        if self.dies:
            raise RuntimeError("download failed")

    def train_dataloader(self):
        return data()


class TestBeforeSetup:
    def test_a_death_has_a_report(self, fit, files):
        error = fit(Plain(), Early(), profiler=PyTorchProfiler(schedule=None))
        report = read_report(files.crash)
        assert report["error"]["message"] == str(error) == "download failed"
        assert report["evidence"]["trace"]["state"] == "saved"
        assert report["evidence"]["history"]["state"] == "absent"
        assert str(files.crash) in error.__notes__[0]
        assert read_report(files.process)["state"] == "failed"

    @pytest.mark.parametrize("same", [True, False], ids=["same recorder", "new recorder"])
    @pytest.mark.parametrize("act", [None, raise_at(3)], ids=["healthy", "died"])
    def test_it_is_not_taken_for_that_of_the_run_before(self, fit, files, act, same):
        recorder = FlightRecorder(watch=False)
        fit(Plain(act), recorder=recorder)
        error = fit(Plain(), Early(), recorder=recorder if same else None)
        assert str(files.crash) in error.__notes__[0]
        report = read_report(files.crash)
        assert report["error"]["message"] == "download failed"
        assert "of an earlier run" in report["evidence"]["history"]["detail"]


class TestAHealthyRunStaysHealthy:
    def test_where_the_directory_cannot_be_made(self, fit, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        before = signal.getsignal(signal.SIGTERM)
        assert fit(Plain(), recorder=FlightRecorder(tmp_path / "file" / "run")) is None
        assert caplog.text.count("FlightRecorder is off: NotADirectoryError") == 1
        assert "6 rows are lost" in caplog.text
        assert signal.getsignal(signal.SIGTERM) == before
        assert not [t for t in threading.enumerate() if t.name == "flight-recorder"]

    def test_where_a_hook_fails(self, fit, files, caplog, monkeypatch):
        monkeypatch.setattr(Recording, "begin_iteration", lambda *_: 1 / 0)
        assert fit(Plain()) is None
        assert caplog.text.count("FlightRecorder is off: ZeroDivisionError") == 1
        assert read_report(files.process)["state"] == "off"
        assert len(read_json_lines(files.history)) == 6

    @pytest.mark.parametrize("iteration", [None, 0.5, True, print], ids=str)
    def test_whatever_the_module_calls_iteration(self, fit, files, iteration):
        module = Plain()
        module.iteration = iteration
        assert fit(module) is None
        assert [row["iteration"] for row in read_json_lines(files.history)] == [1, 2, 3, 4, 5, 6]


def test_a_relative_directory_is_where_it_was_at_the_start(fit, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def act(module, batch_idx):
        if batch_idx == 2:
            monkeypatch.chdir(tmp_path / "elsewhere")
        raise_at(3)(module, batch_idx)

    profiler = PyTorchProfiler(dirpath="traces", schedule=None)
    fit(Plain(act), recorder=FlightRecorder("run", watch=False), profiler=profiler)
    assert read_report(RunLayout(tmp_path / "run").rank(0).crash)["error"]["message"] == "injected"
    assert list((tmp_path / "traces").glob("crash-*"))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_long_validation_is_no_hang(fit, files):
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.3)

    recorder = FlightRecorder(hang_timeout_s=1.0, watch=False)
    assert fit(Validated(), data(), data(5), recorder=recorder, limit_val_batches=5) is None
    assert not files.crash.exists()


class TestAnInterruptThatIsCaught:
    @staticmethod
    def interrupted(rest_s):
        def act(module, batch_idx):
            if batch_idx == 2:
                with contextlib.suppress(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(5)
                time.sleep(rest_s)
            time.sleep(0.1)
            raise_at(8)(module, batch_idx)

        return act

    def test_is_forgotten(self, fit, files, monkeypatch):
        monkeypatch.setattr(recording, "_STUCK_GRACE_S", 0.4)
        fit(Plain(self.interrupted(0.0)), data(10))
        report = read_report(files.crash)
        assert (report["cause"], report["signal"], report["iteration"]) == ("exception", None, 9)
        assert not files.crash.with_suffix(".json.1").exists()

    def test_for_which_evidence_was_saved_is_not_the_later_death(self, fit, files, monkeypatch):
        monkeypatch.setattr(recording, "_STUCK_GRACE_S", 0.4)
        fit(Plain(self.interrupted(1.0)), data(10))
        report = read_report(files.crash)
        assert (report["cause"], report["iteration"]) == ("exception", 9)
        earlier = read_report(files.crash.with_suffix(".json.1"))
        assert (earlier["signal"], earlier["iteration"]) == ("SIGINT", 3)


class TestRoomForTheReport:
    def test_is_there_during_a_run_and_given_back_afterwards(self, fit, files):
        rooms = []

        def act(module, batch_idx):
            rooms.append(sum(p.stat().st_blocks * 512 for p in files.directory.glob(".reserved*")))

        assert fit(Plain(act)) is None
        assert min(rooms) >= 3 << 16
        assert not list(files.directory.glob(".*"))

    def test_lets_a_healthy_run_on_a_full_disk_say_that_it_finished(self, fit, small_disk):
        recorder = FlightRecorder(small_disk, watch=False)

        def act(module, batch_idx):
            if batch_idx == 2:
                fill(small_disk)

        assert fit(Plain(act), recorder=recorder) is None
        process = read_report(RunLayout(small_disk).rank(0).process)
        assert process["state"] == "finished"

    def test_is_given_back_by_the_second_process_where_the_first_one_vanished(self, files):
        files.directory.mkdir(parents=True)
        reserve_room(files.directory)
        write_report(files.process, {"state": "running", "rank": 0})
        assert complete_report(files)
        assert not list(files.directory.glob(".*"))


def test_the_latest_event_files_of_a_run_directory_are_kept(fit, tmp_path):
    for number in range(30):
        path = tmp_path / f"events.out.tfevents.{number}"
        path.write_text(str(number))
        os.utime(path, (number, number))
    fit(Plain())
    kept = [int(path.read_text()) for path in tmp_path.glob("events.out.tfevents.*")]
    assert sorted(kept) == list(range(10, 30))


class TestASecondRunInTheSameDirectory:
    def test_sets_aside_what_the_first_one_left(self, fit, files):
        fit(Plain(raise_at(3)), profiler=PyTorchProfiler(schedule=None))
        assert files.crash_checkpoint.exists()
        assert files.profile.exists()
        fit(Plain())
        for path in (files.crash, files.crash_checkpoint, files.profile):
            assert not path.exists()
            assert path.with_name(f"{path.name}.1").exists()

    @pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
    def test_may_go_on_from_the_crash_checkpoint(self, fit, make_trainer, files):
        fit(Plain(raise_at(3)))
        trainer = make_trainer(max_epochs=1, callbacks=[FlightRecorder(watch=False)])
        trainer.fit(Plain(), data(), ckpt_path=files.crash_checkpoint, weights_only=True)
        assert trainer.global_step > 3

    def test_that_validates_well_leaves_the_death_on_record(self, fit, make_trainer, files):
        class Validated(Plain):
            def validation_step(self, batch, batch_idx):
                pass

        fit(Validated(raise_at(3)))
        left = {path: path.read_bytes() for path in files.directory.iterdir() if path.is_file()}
        settings = {"callbacks": [FlightRecorder(watch=False)], "limit_val_batches": 1}
        make_trainer(**settings).validate(Validated(), data(), verbose=False)
        assert {p: p.read_bytes() for p in files.directory.iterdir() if p.is_file()} == left


@pytest.mark.parametrize(
    ("profiler", "why"),
    [
        (lambda: None, "no PyTorchProfiler was attached"),
        (lambda: WindowProfiler(wait=100), "the profiler was waiting"),
        (
            lambda: PyTorchProfiler(schedule=schedule(wait=100, warmup=1)),
            "the profiler was waiting",
        ),
        (lambda: PyTorchProfiler(schedule=schedule(wait=1, warmup=99)), "was warming up"),
    ],
    ids=["none", "window", "stock", "warming up"],
)
def test_the_report_says_why_there_is_no_trace(fit, files, profiler, why):
    error = fit(Plain(raise_at(3)), profiler=profiler())
    trace = read_report(files.crash)["evidence"]["trace"]
    assert trace["state"] == "absent"
    assert why in trace["detail"]
    assert f"no trace: {trace['detail']}" in error.__notes__[0]


def test_a_large_window_has_a_trace_and_no_table(fit, files, monkeypatch):
    monkeypatch.setattr(profiler_rescue, "_TABLE_BYTES", 10)
    fit(Plain(raise_at(3)), profiler=PyTorchProfiler(schedule=None))
    evidence = read_report(files.crash)["evidence"]
    assert evidence["trace"]["state"] == "saved"
    assert "too large" in evidence["profile"]["detail"]
    assert not files.profile.exists()


def test_of_a_nan_the_report_says_where_it_is(fit, files):
    error = NonFiniteError("NaN", phase="rollout", tensors=["reward"], environments=[3, 5])
    fit(Plain(raise_at(3, error)))
    found = read_report(files.crash)["error"]["non_finite"]
    assert found == {"phase": "rollout", "tensors": ["reward"], "environments": [3, 5]}


@pytest.mark.parametrize("act", [None, raise_at(3)], ids=["healthy", "died"])
def test_a_profiler_keeps_its_own_settings_and_says_nothing(fit, capfd, act):
    profiler = PyTorchProfiler(schedule=schedule(wait=1, warmup=1))
    before = dict(profiler._profiler_kwargs)
    fit(Plain(act), profiler=profiler)
    assert {**profiler._profiler_kwargs, "schedule": None} == {**before, "schedule": None}
    assert "Toggling" not in capfd.readouterr().err


def test_what_the_rescue_does_is_not_in_the_window(fit, files):
    fit(Plain(raise_at(3)), profiler=PyTorchProfiler(schedule=None))
    (path,) = files.trace.glob("*.gz")
    assert b"isfinite" not in gzip.decompress(path.read_bytes())
    with torch.profiler.profile() as after:
        torch.ones(2).isfinite()
    assert any("isfinite" in event.name for event in after.events())


def test_ctrl_c_works_again_although_another_callback_raised(fit):
    class Raises(Callback):
        def on_exception(self, *_):
            os.kill(os.getpid(), signal.SIGINT)  # impatience, while Lightning shuts down
            raise LookupError("in another callback")

    def interrupted(module, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    before = signal.getsignal(signal.SIGINT)
    error = fit(Plain(interrupted), callbacks=[Raises(), FlightRecorder(watch=False)])
    assert isinstance(error, LookupError)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
