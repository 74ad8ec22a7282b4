"""Loggers that fail: the run continues, rows wait, and files are whole."""

import csv
import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esper_lightning import PPO, FlightRecorder, PPOConfig
from esper_lightning.callbacks import loggers
from esper_lightning.callbacks.loggers import guard_loggers
from esper_lightning.envs import CartPole
from esper_lightning.forensics.files import read_json_lines
from tests.disks import fill
from tests.reports import read_report


def ppo(iterations=6) -> PPO:
    config = PPOConfig(rollout_steps=8, minibatches=2, epochs=1)
    return PPO(CartPole(num_envs=4), ppo=config, total_env_steps=32 * iterations)


class Plain(LightningModule):
    """An ordinary supervised module of six steps."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 2})
        self.layer = torch.nn.Linear(2, 1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(12, 2), batch_size=2)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Failing(Logger):
    """A logger that raises in some of its methods."""

    name, version, save_dir = "failing", 0, None

    def __init__(self, *methods, error=None, steps=()):
        super().__init__()
        self.methods, self.steps = methods, steps
        self.error = error or LookupError("no connection")
        self.rows, self.hyperparams = [], None

    def _fail(self, name, step=None):
        if name in self.methods and (step is None or not self.steps or step in self.steps):
            raise self.error

    def log_metrics(self, metrics, step=None):
        self._fail("log_metrics", step)
        self.rows.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        self._fail("log_hyperparams")
        self.hyperparams = params

    def log_graph(self, *args, **kwargs):
        self._fail("log_graph")

    def after_save_checkpoint(self, checkpoint_callback):
        self._fail("after_save_checkpoint")

    def save(self):
        self._fail("save")

    def finalize(self, status):
        self._fail("finalize")
        self.status = status


METHODS = ("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint", "save")
METHODS = (*METHODS, "finalize")


def fit(make_trainer, module, *, logger, callbacks=(), **settings):
    recorder = [FlightRecorder(watch=False)] if isinstance(module, Plain) else []
    settings = {"max_epochs": 1 if isinstance(module, Plain) else -1, **settings}
    trainer = make_trainer(logger=logger, callbacks=[*recorder, *callbacks], **settings)
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("module", [ppo, Plain])
@pytest.mark.parametrize("method", [*METHODS, METHODS])
def test_no_method_of_a_logger_ends_a_run_and_there_is_one_warning(
    make_trainer, caplog, method, module, tmp_path
):
    methods = METHODS if method is METHODS else (method,)
    logger, healthy = Failing(*methods), Failing()
    checkpoints = {"enable_checkpointing": True} if "after_save_checkpoint" in methods else {}
    trainer = fit(make_trainer, module(), logger=[logger, healthy], **checkpoints)
    assert trainer.global_step == 6
    assert len(healthy.rows) >= 6
    assert healthy.status == "success"
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert sum(w.startswith("Failing") and "no connection" in w for w in warnings) == 1


def test_rows_that_a_logger_did_not_take_are_logged_when_it_takes_them(make_trainer, caplog):
    logger, healthy = Failing("log_metrics", steps=(64, 96, 160)), Failing()

    class Recovers(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.iteration == 3:
                logger.steps = (160,)
            if pl_module.iteration == 5:
                logger.methods = ()

    fit(make_trainer, ppo(), logger=[logger, healthy], callbacks=[Recovers()])
    assert [step for step, _ in logger.rows] == [32, 64, 96, 128, 160, 192]
    assert logger.rows == healthy.rows
    assert caplog.text.count("takes no rows: no connection") == 1


@pytest.mark.parametrize("method", ["log_graph", "after_save_checkpoint", "save", "finalize"])
def test_rows_that_wait_are_offered_whenever_the_logger_is_called(method):
    logger = Failing("log_metrics")
    guard_loggers([logger])
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.methods, rows = (), []
    own = getattr(Failing, method)

    def looks(self, *arguments):
        rows.extend(self.rows)
        own(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Failing, method, looks)
        getattr(logger, method)(*() if method == "save" else ("success",))
    assert rows == [(1, {"loss": 1.0})]


def test_a_row_that_waits_is_that_of_when_it_was_logged():
    logger = Failing("log_metrics", "log_hyperparams")
    guard_loggers([logger])
    row, hyperparameters = {"loss": 1.0}, {"width": 2}
    logger.log_metrics(row, step=1)
    logger.log_hyperparams(params=hyperparameters)
    row["loss"], hyperparameters["width"] = 5.0, 6
    logger.methods = ()
    logger.log_metrics(metrics=row, step=2)
    row["loss"] = 9.0
    assert logger.rows == [(1, {"loss": 1.0}), (2, {"loss": 5.0})]
    assert logger.hyperparams == {"width": 2}


def test_a_row_that_a_logger_never_takes_costs_no_other_row(make_trainer, caplog):
    logger = Failing("log_metrics", steps=(64, 128))
    fit(make_trainer, ppo(), logger=logger)
    assert [step for step, _ in logger.rows] == [32, 96, 160, 192]
    assert "Failing: 2 rows are lost" in caplog.text


def test_a_logger_is_left_as_it_was(make_trainer, tmp_path):
    loggers = [Failing("save"), TensorBoardLogger(tmp_path), CSVLogger(tmp_path, name="csv")]
    own = {"status", "log_metrics"}  # of PPO, which steps aside where it is not at work
    before = [{*own, *vars(logger)} for logger in loggers]
    seen = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.extend(
                (isinstance(logger, cls), type(logger).__name__)
                for logger, cls in zip(
                    trainer.loggers, (Failing, TensorBoardLogger, CSVLogger), strict=True
                )
            )
            writer = trainer.loggers[1].experiment
            writer.add_scalar("own", 1.0, 1)
            assert writer is trainer.loggers[1]._experiment

    fit(make_trainer, ppo(), logger=loggers, callbacks=[Looks()])
    assert seen == [(True, "Failing"), (True, "TensorBoardLogger"), (True, "CSVLogger")]
    assert [type(logger) for logger in loggers] == [Failing, TensorBoardLogger, CSVLogger]
    assert [{*own, *vars(logger)} for logger in loggers] == before
    with pytest.raises(LookupError):
        loggers[0].save()


def test_errors_that_end_a_run_by_intention_still_do(make_trainer):
    logger = Failing("log_metrics", error=KeyboardInterrupt())
    with pytest.raises(SystemExit):
        fit(make_trainer, ppo(), logger=logger)


def test_the_error_of_the_run_is_not_replaced_by_one_of_its_logger(make_trainer):
    class Dies(Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError("the run's")

    for module in (ppo(), Plain()):
        with pytest.raises(ZeroDivisionError, match="the run's"):
            fit(make_trainer, module, logger=Failing("finalize", "save"), callbacks=[Dies()])


def test_a_logger_that_never_ends_does_not_hold_a_run_that_died(make_trainer, monkeypatch, caplog):
    class Hangs(Failing):
        def finalize(self, status):
            blocked.wait(60)

    class Dies(Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError("the run's")

    monkeypatch.setattr(loggers, "_FINALIZE_S", 0.2)
    blocked = threading.Event()
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="the run's"):
        fit(make_trainer, ppo(), logger=Hangs(), callbacks=[Dies()])
    assert time.monotonic() - began < 30
    blocked.set()
    assert "Hangs has not ended within 0.2 s" in caplog.text


class FillsDisk(Callback):
    """Fill the disk from one iteration to another."""

    def __init__(self, disk, first, last=None):
        self.disk, self.first, self.last = disk, first, last

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.first:
            self.ballast = fill(self.disk)
        if batch_idx == self.last:
            self.ballast.unlink()


def scalars(directory, tag):
    events = EventAccumulator(str(directory)).Reload()
    return [event.step for event in events.Scalars(tag)]


@pytest.fixture
def no_thread_dies(monkeypatch):
    died = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    yield
    assert died == []


@pytest.mark.usefixtures("no_thread_dies")
class TestTensorBoardOnAFullDisk:
    @pytest.mark.parametrize("module", [ppo, Plain])
    def test_training_goes_on_and_every_row_is_there_once_there_is_room(
        self, make_trainer, small_disk, caplog, module
    ):
        logger = TensorBoardLogger(small_disk, name="", version="")
        callbacks = [FillsDisk(small_disk, 1, 4), LogsMuch()]
        trainer = fit(make_trainer, module(), logger=logger, callbacks=callbacks)
        assert trainer.global_step == 6
        scale = 32 if module is ppo else 1  # the x axis of PPO is environment steps
        assert scalars(small_disk, "much/0") == [scale * k for k in range(6)]
        assert scalars(small_disk, "much/99") == [scale * k for k in range(6)]
        tag = "loss" if module is Plain else "loss/value"
        assert len(scalars(small_disk, tag)) == 6
        messages = [r.getMessage() for r in caplog.records if "tfevents" in r.getMessage()]
        assert ["No space left" in message for message in messages] == [True, False]

    def test_what_is_lost_at_the_end_is_said_and_the_run_is_well(
        self, make_trainer, small_disk, caplog
    ):
        logger = TensorBoardLogger(small_disk, name="", version="")
        room = FillsDisk(small_disk, 1)
        trainer = fit(make_trainer, ppo(), logger=logger, callbacks=[room, LogsMuch()])
        assert trainer.global_step == 6
        assert "rows are lost" in caplog.text
        assert scalars(small_disk, "much/0")[:1] == [0]

    def test_that_is_full_when_the_run_begins(self, make_trainer, small_disk, caplog):
        logger = TensorBoardLogger(small_disk, name="", version="")
        ballast = fill(small_disk)

        class MakesRoom(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if batch_idx == 3:
                    ballast.unlink()

        trainer = fit(make_trainer, ppo(), logger=logger, callbacks=[MakesRoom()])
        assert trainer.global_step == 6
        assert yaml.safe_load((small_disk / "hparams.yaml").read_text())
        assert scalars(small_disk, "loss/value") == [32, 64, 96, 128, 160, 192]
        assert len(list(small_disk.glob("events.out.tfevents.*"))) == 1
        assert caplog.text.count("No space left") == 1

    def test_that_stays_full_holds_no_torn_file(self, make_trainer, small_disk):
        fill(small_disk)
        fit(make_trainer, ppo(), logger=TensorBoardLogger(small_disk, name="", version=""))
        assert not list(small_disk.glob("*hparams*"))
        assert not list(small_disk.glob("events*"))

    def test_a_death_leaves_its_report_in_the_run_directory(self, make_trainer, small_disk):
        class Dies(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx == 4:
                    raise ZeroDivisionError("the run's")

        logger = TensorBoardLogger(small_disk, name="", version="")
        callbacks = [FillsDisk(small_disk, 2), LogsMuch(), Dies()]
        with pytest.raises(ZeroDivisionError, match="the run's"):
            fit(make_trainer, Plain(), logger=logger, callbacks=callbacks)
        report = read_report(small_disk / "rank0" / "crash.json")
        assert (report["error"]["type"], report["complete"]) == ("ZeroDivisionError", True)
        assert report["evidence"]["loggers"]["state"] == "failed"
        assert "No space left" in report["evidence"]["loggers"]["detail"]
        assert read_report(small_disk / "rank0" / "process.json")["state"] == "failed"
        assert not list((small_disk / "rank0").glob(".*"))


class LogsMuch(Callback):
    """More than fits into what is left of a block."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        metrics = {f"much/{number}": float(batch_idx) for number in range(400)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=batch_idx)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("until", [4, None])
def test_the_table_of_the_csv_logger_is_whole_on_a_full_disk(
    make_trainer, small_disk, caplog, until
):
    logger = CSVLogger(small_disk, name="", version="", flush_logs_every_n_steps=1)
    callbacks = [FillsDisk(small_disk, 1, until), LogsMuch()]
    trainer = fit(make_trainer, ppo(), logger=logger, callbacks=callbacks)
    assert trainer.global_step == 6
    rows = table(small_disk / "metrics.csv")
    steps = [int(row["step"]) for row in rows if row["much/99"]]
    if until is None:
        assert steps == [32 * k for k in range(len(steps))]
        assert "values that it held are lost" in caplog.text
    else:
        assert steps == [32 * k for k in range(6)]
        assert sum(bool(row.get("loss/value")) for row in rows) == 6
    assert all(None not in row and None not in row.values() for row in rows)
    assert yaml.safe_load((small_disk / "hparams.yaml").read_text())
    assert not list(small_disk.glob(".*"))


def test_a_table_whose_longer_head_could_not_be_written_has_it_later(tmp_path, monkeypatch, caplog):
    logger = CSVLogger(tmp_path, name="", version="")
    guard_loggers([logger])
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logger.experiment, "_rewrite_with_new_header", full)
        logger.log_metrics({"a": 2.0, "b": 3.0}, step=1)
        logger.save()
    assert "No space left" in caplog.text
    assert table(tmp_path / "metrics.csv") == [{"a": "1.0", "step": "0"}]
    logger.log_metrics({"b": 4.0}, step=2)
    logger.save()
    assert table(tmp_path / "metrics.csv") == [
        {"a": "1.0", "b": "", "step": "0"},
        {"a": "2.0", "b": "3.0", "step": "1"},
        {"a": "", "b": "4.0", "step": "2"},
    ]


def test_a_file_system_that_takes_no_more_files_is_full(tmp_path, monkeypatch, caplog):
    """Else each row would start a thread of TensorBoard's that dies with a traceback."""
    found = SimpleNamespace(f_bfree=9**9, f_bavail=9**9, f_frsize=4096, f_files=9, f_ffree=0)
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    guard_loggers([logger])
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step=step)
    assert not list(tmp_path.iterdir())
    assert caplog.text.count("No space left") == 1


def test_a_row_that_was_torn_is_not_in_the_table(tmp_path, monkeypatch):
    logger = CSVLogger(tmp_path, name="", version="")
    guard_loggers([logger])
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()

    def torn(writer, _):
        writer.writer.writerow(["2."])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", torn)
        logger.log_metrics({"a": 2.0}, step=1)
        logger.save()
    logger.save()
    assert [row["a"] for row in table(tmp_path / "metrics.csv")] == ["1.0", "2.0"]


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_rank_that_is_not_the_first_writes_nothing_and_has_no_complaint(
    tmp_path, monkeypatch, caplog, kind
):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = kind(tmp_path, name="", version="")
    guard_loggers([logger])
    logger.log_hyperparams({"width": 1})
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    logger.finalize("success")
    assert not list(tmp_path.rglob("*.*"))
    assert not caplog.records


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_kill_while_a_logger_writes_leaves_whole_files(tmp_path, monkeypatch, kind):
    """No existing file may be opened for writing, except to append."""
    logger = kind(tmp_path, name="", version="")
    guard_loggers([logger])
    unsafe, real = [], open

    def watched(file, mode="r", *args, **kwargs):
        if "w" in mode and not Path(file).name.startswith("."):
            unsafe.append((Path(file).name, Path(file).exists()))
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr("fsspec.implementations.local.open", watched, raising=False)
    logger.log_hyperparams({"width": 1})
    for step in range(4):
        logger.log_metrics({f"m{step}": 1.0, "x": 2.0}, step=step)
        logger.save()
    logger.log_hyperparams({"height": 1})
    logger.finalize("success")
    new = [("metrics.csv", False)] if kind is CSVLogger else []
    assert unsafe == new
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text())["width"] == 1
    if kind is CSVLogger:
        assert [row["x"] for row in table(tmp_path / "metrics.csv")] == ["2.0"] * 4
        assert yaml.safe_load((tmp_path / "hparams.yaml").read_text())["height"] == 1


def test_the_cause_is_named_and_not_what_a_logger_makes_of_it(make_trainer, caplog):
    class Masks(Failing):
        def log_metrics(self, metrics, step=None):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise ValueError("you tried to log 51.34 which is not supported") from error

    fit(make_trainer, ppo(), logger=Masks())
    assert "No space left on device" in caplog.text
    assert "you tried" not in caplog.text


def test_the_history_is_complete_whatever_the_logger_does(make_trainer, tmp_path):
    fit(make_trainer, Plain(), logger=Failing(*METHODS), default_root_dir=tmp_path)
    rows = read_json_lines(tmp_path / "rank0" / "history.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_logger_that_cannot_be_guarded_is_named_once(caplog):
    class Final:
        def __init_subclass__(cls):
            raise TypeError("it has no subclasses")

    loggers = [Final()]
    guard_loggers(loggers)
    guard_loggers(loggers, lambda: 1)
    assert caplog.text.count("Final has no guard against its own errors") == 1
