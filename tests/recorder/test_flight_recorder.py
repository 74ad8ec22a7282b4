"""The flight recorder in the process of the tests; ``tests/crash`` lets whole processes die."""

import contextlib
import errno
import gc
import gzip
import json
import os
import resource
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.processes import identify
from esper_lightning.forensics.report import CrashReport
from esper_lightning.forensics.room import reserve_room
from esper_lightning.forensics.sidecar import complete_report
from esper_lightning.recorder import evidence_steps, recording, rescue
from esper_lightning.recorder import profiler_guard as profiler_rescue
from esper_lightning.recorder.peers import Peers
from esper_lightning.recorder.profiling.window_profiler import WindowProfiler
from esper_lightning.recorder.recording import Recording, recording_of
from tests.disks import fill
from tests.reports import read_report, write_report


def schedule(wait, warmup=0):
    return torch.profiler.schedule(wait=wait, warmup=warmup, active=1)


class Plain(LightningModule):
    """A module that calls ``act(module, batch_idx)`` in every step."""

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
    """A module that dies before ``setup`` of any callback."""

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
        recorder = FlightRecorder(files.directory.parent, watch=False)
        fit(Plain(act), recorder=recorder)
        again = FlightRecorder(files.directory.parent, watch=False)
        error = fit(Plain(), Early(), recorder=recorder if same else again)
        assert str(files.crash) in error.__notes__[0]
        report = read_report(files.crash)
        assert report["error"]["message"] == "download failed"
        assert "of an earlier run" in report["evidence"]["history"]["detail"]


class TestEvidenceIsSavedInOrder:
    """Cheap and certain evidence comes first: a second death during the rescue leaves a report."""

    def test_a_report_is_there_before_the_checkpoint_is_begun(self, fit, files, monkeypatch):
        seen = []

        def save(*_):
            seen.append(read_report(files.crash))
            return "saved"

        monkeypatch.setattr(evidence_steps, "save_crash_checkpoint", save)
        fit(Plain(raise_at(3)), profiler=PyTorchProfiler(schedule=None))
        (report,) = seen
        assert (report["cause"], report["error"]["message"]) == ("exception", "injected")
        assert report["evidence"]["history"]["state"] == "saved"
        assert report["evidence"]["trace"]["state"] == "pending"
        assert not report["complete"]

    def test_a_step_that_hangs_does_not_keep_the_next_ones(self, fit, files, tmp_path):
        ended = threading.Event()

        class Hangs(CSVLogger):
            def save(self):
                if threading.current_thread() is not threading.main_thread():
                    ended.wait(60)

        started = time.monotonic()
        logger = Hangs(tmp_path, name="", version="")
        try:
            fit(Plain(raise_at(3)), logger=logger)
            assert time.monotonic() - started < 30
        finally:
            ended.set()
        evidence = read_report(files.crash)["evidence"]
        assert evidence["loggers"] == {
            "state": "failed",
            "path": None,
            "detail": "not done within 5 s",
        }
        assert evidence["checkpoint"]["state"] == "saved"

    def test_two_threads_that_see_the_death_save_it_once(self, fit, files, monkeypatch):
        made = []

        def slowly(**settings):
            time.sleep(0.5)  # so that the other one comes
            made.append(rescue.Rescue(**settings))
            return made[-1]

        monkeypatch.setattr(recording, "Rescue", slowly)
        recorder, others = FlightRecorder(watch=False), []

        def act(module, batch_idx):
            if batch_idx == 3:
                recording = recording_of(module.trainer)
                others.append(threading.Thread(target=recording.save_for_launcher))
                others[0].start()
                raise RuntimeError("injected")

        fit(Plain(act), recorder=recorder)
        others[0].join()
        assert len(made) == 1
        report = read_report(files.crash)
        assert (report["complete"], report["error"]["message"]) == (True, "injected")


class TestOneFileThatIsImpossibleTakesNoOtherWithIt:
    @pytest.fixture
    def limit_files(self):
        """Limit the size of files, as ``ulimit -f`` does."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_the_ring(self, fit, files, limit_files, caplog):
        limit_files(60_000)
        error = fit(Plain(raise_at(3)), profiler=PyTorchProfiler(schedule=None))
        assert str(error) == "injected"
        assert caplog.text.count("does not take every file") == 1
        report = read_report(files.crash)
        assert any("training_step" in name for name in report["phases"])
        assert (report["complete"], report["iteration"]) == (True, 4)
        assert len(read_json_lines(files.history)) == 3
        for name in ("trace", "checkpoint", "profile"):
            assert report["evidence"][name]["state"] == "saved", name

    def test_a_trace_in_one_file(self, fit, files, limit_files):
        """The trace is in several whole files, with the end of the run in the last."""

        def act(module, batch_idx):
            for _ in range(600):
                torch.special.erfcx(torch.ones(3))
            if batch_idx == 3:
                torch.special.i1e(torch.ones(3))
                raise RuntimeError("injected")

        limit_files(9_000)
        assert str(fit(Plain(act), profiler=PyTorchProfiler(schedule=None))) == "injected"
        evidence = read_report(files.crash)["evidence"]
        assert evidence["trace"]["state"] == "saved"
        pieces = sorted(files.trace.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert len(pieces) > 1
        assert f"in {len(pieces)} pieces" in evidence["trace"]["detail"]
        assert files.directory / evidence["trace"]["path"] == pieces[-1]
        traces = [json.loads(gzip.decompress(path.read_bytes())) for path in pieces]
        names = [[event["name"] for event in trace["traceEvents"]] for trace in traces]
        assert sum(name == "aten::special_erfcx" for piece in names for name in piece) == 2400
        assert "aten::special_i1e" in names[-1]
        assert max(path.stat().st_size for path in pieces) <= 9_000

    @pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
    def test_the_record_of_the_process(self, fit, files, monkeypatch, caplog, problem):
        def refuse(*_, **__):
            raise OSError(problem, os.strerror(problem))

        monkeypatch.setattr(Peers, "report", refuse)
        assert str(fit(Plain(raise_at(3)))) == "injected"
        assert read_report(files.crash)["complete"]
        assert "FlightRecorder is off" not in caplog.text


class TestAWindowThatCannotGoWhereTheUsersGo:
    @staticmethod
    def fill(monkeypatch, folder):
        """Act as Kineto on a full disk: a torn file, a line on stderr, and no error."""
        folder.mkdir()
        true = torch.profiler.profile.export_chrome_trace

        def export(profile, path, *args, **kwargs):
            if Path(path).is_relative_to(folder):
                Path(f"{path}.tmp").write_text("{")
            else:
                true(profile, path, *args, **kwargs)

        monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)

    @pytest.mark.parametrize("closes", ["in the midst", "at the end"])
    @pytest.mark.parametrize("place", ["full", "unwritable", "of the user's function", "named"])
    def test_is_in_the_run_directory(
        self, fit, files, tmp_path, monkeypatch, caplog, place, closes
    ):
        folder, settings = tmp_path / "traces", {}
        if place == "full":
            self.fill(monkeypatch, folder)
        else:
            folder.write_text("in the place of the folder")
        if place == "of the user's function":
            settings["on_trace_ready"] = torch.profiler.tensorboard_trace_handler(str(folder))
        if place == "named":  # the profiler writes its table there, too
            settings["filename"] = "profile"
        plan = schedule(wait=1, warmup=1) if closes == "in the midst" else None
        profiler = PyTorchProfiler(dirpath=folder, schedule=plan, **settings)
        assert fit(Plain(), profiler=profiler) is None
        (trace,) = files.trace.iterdir()
        assert b"aten::linear" in gzip.decompress(trace.read_bytes())
        assert caplog.text.count(str(files.trace)) == 1
        assert not list(tmp_path.rglob("*.tmp"))
        assert len(read_json_lines(files.history)) == 6
        assert read_report(files.process)["state"] == "finished"

    @pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
    def test_its_table_is_in_the_run_directory(self, fit, files, tmp_path, kind):
        (tmp_path / "tables").write_text("in the place of the folder")
        profiler = kind(dirpath=tmp_path / "tables", filename="table")
        assert fit(Plain(), profiler=profiler) is None
        assert "Profiler Report" in files.profile.read_text()
        assert read_report(files.process)["state"] == "finished"

    @pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
    def test_on_a_full_disk_it_says_nothing_more_when_it_is_collected(
        self, fit, files, small_disk, caplog, kind
    ):
        fill(small_disk)
        profiler = kind(dirpath=small_disk, filename="table")
        assert fit(Plain(), profiler=profiler) is None
        assert "Profiler Report" in files.profile.read_text()
        assert caplog.text.count("The profiler failed and is off") == 1
        assert not list(small_disk.glob("*.txt"))
        profiler.__del__()

    def test_or_is_lost_with_one_warning(self, fit, files, tmp_path, caplog):
        (tmp_path / "traces").write_text("")
        write_report(files.process, {"pid": 1})
        files.trace.write_text("")
        profiler = PyTorchProfiler(dirpath=tmp_path / "traces", schedule=schedule(wait=1, warmup=1))
        recorder = FlightRecorder(tmp_path, watch=False)
        assert fit(Plain(), recorder=recorder, profiler=profiler) is None
        assert caplog.text.count("A recorded window is lost") == 1
        assert len(read_json_lines(files.history)) == 6


def test_an_exception_that_unwinds_is_no_step_of_the_schedule(fit, files):
    """A step of the schedule would close the window in which the run died, as if it were whole."""
    plan = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1)
    fit(Plain(raise_at(3)), profiler=PyTorchProfiler(schedule=plan))
    trace = read_report(files.crash)["evidence"]["trace"]
    assert (trace["state"], trace["detail"]) == (
        "saved",
        "the window that was open, up to the death",
    )


def test_the_next_run_reports_the_death_of_one_that_died_with_its_container(fit, files):
    gone = {**identify(os.getpid()).to_dict(), "start_ticks": 1, "rank": 0, "started_s": 5.0}
    write_report(files.process, {**gone, "state": "running"})
    ring = PhaseRing(files.phases)
    ring.iteration = 17
    ring.enter("rollout")
    ring.close()
    recorder = FlightRecorder(files.directory.parent, watch=False)
    assert fit(Plain(), recorder=recorder) is None
    report = read_report(files.crash.with_suffix(".json.1"))
    assert (report["cause"], report["iteration"], report["phases"]) == ("vanished", 17, ["rollout"])
    assert report["start_ticks"] == 1
    assert not files.crash.exists()
    assert read_report(files.process)["state"] == "finished"


class LostPeerError(RuntimeError):
    """An error that is not gloo's own."""


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "peer"),
        (LostPeerError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "exception"),
        (RuntimeError("NCCL says: Connection closed by peer"), "exception"),
    ],
)
def test_a_collective_that_lost_a_peer_is_an_effect(fit, files, error, cause):
    fit(Plain(raise_at(3, error)))
    assert read_report(files.crash)["cause"] == cause


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


class Evaluated(Plain):
    """A module that is evaluated, too."""

    def validation_step(self, batch, batch_idx):
        self.act(self, batch_idx)


def test_an_evaluation_after_a_fit_is_recorded_and_the_next_fit_may_begin(
    make_trainer, tmp_path, caplog
):
    def fail(module, batch_idx):
        raise ZeroDivisionError("in the evaluation")

    logger = TensorBoardLogger(tmp_path, name="", version="")  # its file is closed after a fit
    recorder = FlightRecorder(watch=False)
    settings = {"logger": logger, "callbacks": [recorder], "max_steps": 2}
    trainer = make_trainer(**settings, limit_val_batches=1)
    trainer.fit(Plain(), data())
    trainer.validate(Evaluated(), data(), verbose=False)
    with pytest.raises(ZeroDivisionError):
        trainer.validate(Evaluated(fail), data(), verbose=False)
    crash = next(tmp_path.rglob("crash.json"))
    assert read_report(crash)["error"]["message"] == "in the evaluation"
    trainer.fit(Plain(), data())
    assert "FlightRecorder is off" not in caplog.text


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


def test_a_hang_ends_the_process_where_that_is_asked_for(fit, files, monkeypatch):
    ended = []

    def end(status):
        ended.append((status, read_report(files.crash), read_report(files.process)))

    monkeypatch.setattr(recording, "end_at_once", end)

    def act(module, batch_idx):
        if batch_idx == 2:
            time.sleep(1.5)

    recorder = FlightRecorder(hang_timeout_s=0.5, hang_ends=True, watch=False)
    fit(Plain(act), recorder=recorder)
    ((status, report, process),) = ended
    assert status == 1
    assert (report["cause"], report["complete"], report["iteration"]) == ("hang", True, 3)
    assert (process["state"], process["evidence_saved"]) == ("failed", True)


def test_a_hang_cannot_end_a_run_that_looks_for_none():
    with pytest.raises(ValueError, match="hang_ends must be false without hang_timeout_s"):
        FlightRecorder(hang_ends=True)


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

    def test_in_the_last_iteration_is_no_death_of_a_run_that_ends_well(
        self, fit, files, monkeypatch
    ):
        monkeypatch.setattr(recording, "_STUCK_GRACE_S", 0.4)
        assert fit(Plain(self.interrupted(1.0)), data(3)) is None
        assert json.loads(files.process.read_text())["state"] == "finished"
        assert not files.crash.exists()
        earlier = read_report(files.crash.with_suffix(".json.1"))
        assert (earlier["cause"], earlier["signal"]) == ("signal", "SIGINT")


def test_the_failure_of_another_rank_is_no_death_of_a_run_that_ends_well(fit, files, monkeypatch):
    failed = []
    monkeypatch.setattr(Peers, "first_failure", lambda _: failed[0] if failed else None)

    def act(_, batch_idx):
        if batch_idx == 2:
            failed.append((1, "it failed"))
            time.sleep(2)

    assert fit(Plain(act), data(3)) is None
    assert json.loads(files.process.read_text())["state"] == "finished"
    assert not files.crash.exists()
    assert read_report(files.crash.with_suffix(".json.1"))["cause"] == "peer"


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

    def test_is_found_again_where_the_report_of_an_earlier_death_took_it(self, fit, small_disk):
        for number in range(3):

            def act(module, batch_idx, number=number):
                if batch_idx == 2:
                    fill(small_disk)
                    raise RuntimeError(str(number))

            fit(Plain(act), recorder=FlightRecorder(small_disk, watch=False))
            report = read_report(RunLayout(small_disk).rank(0).crash)
            assert report["error"]["message"] == str(number)
            fill(small_disk)

    def test_is_given_back_by_the_second_process_where_the_first_one_vanished(self, files):
        files.directory.mkdir(parents=True)
        reserve_room(files.directory)
        write_report(files.process, {"state": "running", "rank": 0})
        assert complete_report(files)
        assert not list(files.directory.glob(".*"))


def test_the_latest_event_files_of_the_runs_are_kept_and_all_of_anybody_else(fit, tmp_path):
    theirs = [tmp_path / f"events.out.tfevents.{number}.mine.1.0" for number in range(26)]
    for path in theirs:
        path.write_text("mine")
    ours = []
    for _ in range(24):
        before = set(tmp_path.glob("events.out.tfevents.*"))
        logger = TensorBoardLogger(tmp_path, name="", version="")
        logger.experiment.add_text("one run", "in one second and another")
        (path,) = set(tmp_path.glob("events.out.tfevents.*")) - before
        ours.append(path)
        assert fit(Plain(), data(1), logger=logger) is None
    assert set(tmp_path.glob("events.out.tfevents.*")) == {*theirs, *ours[-21:]}
    assert {path.read_text() for path in theirs} == {"mine"}


@pytest.mark.parametrize("name", ["process.json", "phases.ring", "crash.json.1"])
def test_a_directory_with_somebody_elses_files_is_refused(fit, files, name):
    for number in range(12):
        path = files.directory / f"{name}{number or ''}"
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = {path: path.read_text() for path in files.directory.iterdir()}
    error = fit(Plain(), recorder=FlightRecorder(files.directory.parent, watch=False))
    assert "It holds rank0, which no run wrote." in str(error)
    assert {path: path.read_text() for path in files.directory.iterdir()} == before
    assert [path.name for path in files.directory.parent.iterdir()] == ["rank0"]


def test_evidence_that_no_place_took_is_not_said_to_be_saved(fit, files, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(CrashReport, "write", refuse)
    fit(Plain(raise_at(3)))
    process = read_report(files.process)
    assert (process["state"], process["evidence_saved"]) == ("failed", False)


class TestASecondRunInTheSameDirectory:
    def test_sets_aside_what_the_first_one_left(self, fit, files):
        fit(Plain(raise_at(3)), profiler=PyTorchProfiler(schedule=None))
        assert files.crash_checkpoint.exists()
        assert files.profile.exists()
        fit(Plain(), recorder=FlightRecorder(files.directory.parent, watch=False))
        for path in (files.crash, files.crash_checkpoint, files.profile):
            assert not path.exists()
            assert path.with_name(f"{path.name}.1").exists()

    @pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
    def test_may_go_on_from_the_crash_checkpoint(self, fit, make_trainer, files):
        fit(Plain(raise_at(3)))
        recorder = FlightRecorder(files.directory.parent, watch=False)
        trainer = make_trainer(max_epochs=1, callbacks=[recorder])
        trainer.fit(Plain(), data(), ckpt_path=files.crash_checkpoint, weights_only=True)
        assert trainer.global_step > 3

    def test_that_validates_well_leaves_the_death_on_record(self, fit, make_trainer, files):
        class Validated(Plain):
            def validation_step(self, batch, batch_idx):
                pass

        fit(Validated(raise_at(3)))

        def listing():
            found = (path for path in files.directory.iterdir() if path.name != ".set_aside")
            return {path: path.read_bytes() for path in found if path.is_file()}

        left = listing()
        recorder = FlightRecorder(files.directory.parent, watch=False)
        settings = {"callbacks": [recorder], "limit_val_batches": 1}
        make_trainer(**settings).validate(Validated(), data(), verbose=False)
        assert listing() == left


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


def test_an_iteration_has_begun_for_the_report_before_any_other_callback_hears_of_it(fit, files):
    class Raises(Callback):
        def on_train_batch_start(self, _trainer, _module, _batch, batch_idx):
            if batch_idx == 2:
                raise LookupError("in another callback")

    assert isinstance(fit(Plain(), callbacks=[Raises(), FlightRecorder(watch=False)]), LookupError)
    assert read_report(files.crash)["iteration"] == 3


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


class Tunable(Plain):
    """A module that Lightning's tuners can tune."""

    def __init__(self, act=None):
        super().__init__(act)
        self.lr = 1e-3
        self.batch_size = 1

    def train_dataloader(self):
        return DataLoader(torch.ones(64, 4), self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Replaces(Callback):
    """A callback that replaces all other callbacks from some hook on."""

    def __init__(self, hook):
        setattr(self, hook, self._replace)

    def _replace(self, trainer, *_):
        trainer.callbacks = [Callback()]


class RunsTheLoop(Callback):
    """Trains by itself before training begins."""

    def on_fit_start(self, trainer, module):
        trainer.fit_loop.run()


class Loop(_FitLoop):
    """Of somebody's own."""


class ReplacesTheLoop(Callback):
    def on_fit_start(self, trainer, module):
        own = Loop(trainer, max_epochs=1)
        own._data_source = trainer.fit_loop._data_source
        trainer.fit_loop = own


def finders():
    return {
        "learning rate": LearningRateFinder(num_training_steps=5),
        "batch size": BatchSizeFinder(steps_per_trial=4, max_trials=2, init_val=1),
        "own callbacks from on_fit_start": Replaces("on_fit_start"),
        "own callbacks from a batch on": Replaces("on_train_batch_start"),
        "runs the loop": RunsTheLoop(),
        "own loop": ReplacesTheLoop(),
    }


@pytest.mark.filterwarnings("ignore:.*max_epochs")
class TestACallbackThatTakesOver:
    @pytest.fixture
    def fit_tuned(self, make_trainer):
        def fit_tuned(module, name):
            callbacks = [FlightRecorder(watch=False), finders()[name]]
            trainer = make_trainer(callbacks=callbacks, max_epochs=1, limit_train_batches=6)
            try:
                trainer.fit(module)  # with its own data: BatchSizeFinder takes no other
            except BaseException as error:
                return error
            return None

        return fit_tuned

    @pytest.mark.parametrize("name", finders())
    def test_does_not_lose_an_error(self, fit_tuned, files, name):
        error = fit_tuned(Tunable(raise_at(3)), name)
        assert str(error) == "injected"
        report = read_report(files.crash)
        assert (report["error"]["message"], report["complete"]) == ("injected", True)
        assert str(files.crash) in error.__notes__[0]
        assert len(error.__notes__) == 1
        assert read_report(files.process)["state"] == "failed"

    @pytest.mark.parametrize("name", finders())
    def test_leaves_a_healthy_run_healthy(self, fit_tuned, files, name):
        assert fit_tuned(Tunable(), name) is None
        assert read_report(files.process)["state"] == "finished"
        assert not files.crash.exists()
        if "own callbacks" not in name:
            rows = [row["iteration"] for row in read_json_lines(files.history)]
            assert rows[-6:] == list(range(rows[-6], rows[-6] + 6))


class Within(Callback):
    """A callback that calls a function in the middle of a fit."""

    def __init__(self, act):
        self.act = act

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3:
            self.act(trainer, module)


class TestARunWithinARun:
    def test_of_another_trainer_is_recorded_for_itself_by_the_same_recorder(self, fit, tmp_path):
        recorder, errors = FlightRecorder(watch=False), []

        def inner(trainer, module):
            root = tmp_path / "inner"
            errors.append(fit(Plain(raise_at(2)), recorder=recorder, default_root_dir=root))

        assert fit(Plain(), callbacks=[recorder, Within(inner)]) is None
        outer, inner = RunLayout(tmp_path).rank(0), RunLayout(tmp_path / "inner").rank(0)
        assert read_report(inner.crash)["iteration"] == 3
        assert read_report(inner.process)["state"] == "failed"
        assert str(errors[0]) == "injected"
        assert not outer.crash.exists()
        assert read_report(outer.process)["state"] == "finished"
        assert len(read_json_lines(outer.history)) == 6

    @pytest.mark.parametrize("fails", [False, True])
    def test_of_the_same_trainer_is_part_of_it(self, fit, files, fails):
        class Validated(Plain):
            def validation_step(self, batch, batch_idx):
                if fails:
                    raise LookupError("in the validation")

        def inner(trainer, module):
            with contextlib.suppress(LookupError):
                trainer.validate(module, data(1), verbose=False)
            assert read_report(files.process)["state"] == "running"
            raise RuntimeError("afterwards")

        recorder = FlightRecorder(watch=False)
        settings = {"callbacks": [recorder, Within(inner)], "limit_val_batches": 1}
        assert str(fit(Validated(), data(), data(), **settings)) == "afterwards"
        assert read_report(files.crash)["error"]["message"] == "afterwards"
        assert read_report(files.process)["state"] == "failed"


def test_a_profiler_that_somebody_replaces_makes_no_death_of_the_run(fit, files):
    def replace(trainer, module):
        trainer.profiler = PassThroughProfiler()

    assert fit(Plain(), callbacks=[FlightRecorder(watch=False), Within(replace)]) is None
    assert read_report(files.process)["state"] == "finished"


def test_a_tuner_that_trains_for_long_is_no_hang(fit, files):
    class Trains(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                for _ in range(5):
                    with trainer.profiler.profile("run_training_batch"):
                        time.sleep(0.3)

    recorder = FlightRecorder(hang_timeout_s=1.0, watch=False)
    assert fit(Plain(), callbacks=[recorder, Trains()], max_epochs=2) is None
    assert not files.crash.exists()


@pytest.mark.filterwarnings("ignore:.*Profiler clears events", "ignore:.*num_workers")
def test_the_guide_begins_with_a_program_that_runs(tmp_path, monkeypatch):
    guide = Path(__file__).parents[2] / "docs" / "crash-guide.md"
    monkeypatch.chdir(tmp_path)
    exec(guide.read_text().split("```python\n")[1].split("```")[0], {})
    (run,) = tmp_path.glob("lightning_logs/*")
    assert read_report(RunLayout(run).rank(0).process)["state"] == "finished"


class TestADeathWhileTheRecordingBegins:
    """The recorder is in its ``setup``, and has taken the signals already."""

    def test_leaves_a_report(self, fit, files, monkeypatch):
        own_profiler, calls = recording.own_profiler, []

        def stopped(trainer):
            calls.append(trainer)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            return own_profiler(trainer)

        monkeypatch.setattr(recording, "own_profiler", stopped)
        handler = signal.getsignal(signal.SIGTERM)
        error = fit(Plain())
        assert isinstance(error, SystemExit)
        assert error.code == 128 + signal.SIGTERM
        report, process = read_report(files.crash), read_report(files.process)
        assert (report["cause"], report["signal"]) == ("signal", "SIGTERM")
        assert (process["state"], process["evidence_saved"]) == ("failed", True)
        assert signal.getsignal(signal.SIGTERM) is handler

    def test_is_none_where_the_recorder_itself_fails(self, fit, files, monkeypatch):
        def fails(_):
            raise RuntimeError("no profiler")

        monkeypatch.setattr(recording, "own_profiler", fails)
        assert fit(Plain()) is None
        process = read_report(files.process)
        assert (process["state"], process["evidence_saved"]) == ("off", False)
        assert not files.crash.exists()
