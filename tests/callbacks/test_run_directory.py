"""A run writes into its own directory, and no other run writes there."""

import contextlib
import errno
import os
import subprocess
import sys
import threading

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.trainer.states import TrainerStatus
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder, History, LastCheckpoint
from esper_lightning.callbacks import directory_choice
from esper_lightning.callbacks.run_directory import (
    begin_run_directory,
    end_run,
    open_run_directory,
    run_directory,
)
from esper_lightning.forensics.claims import DirectoryInUseError, DirectoryRefusedError, claim
from esper_lightning.forensics.files import read_json_lines
from tests.recorder.test_flight_recorder import Plain, raise_at

OWNER = """
import sys
from pathlib import Path
from esper_lightning.forensics.claims import claim
held = claim(Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.readline()
"""


class Shared(Logger):
    """A logger without a folder for each run, like those of W&B and MLflow."""

    name, version, save_dir = "shared", "0", "."

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass


@contextlib.contextmanager
def somebody_in(directory):
    """A living process that owns a directory."""
    command = [sys.executable, "-c", OWNER, str(directory)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def fit(make_trainer):
    def fit(*callbacks, act=None, **settings):
        given = callbacks or (FlightRecorder(watch=False),)
        trainer = make_trainer(callbacks=list(given), max_epochs=1, **settings)
        trainer.fit(Plain(act), DataLoader(torch.ones(3, 4)))
        return trainer

    return fit


def rows(directory):
    return [row["iteration"] for row in read_json_lines(directory / "rank0" / "history.jsonl")]


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("recorder", [FlightRecorder, History])
def test_a_directory_that_a_living_run_owns_is_refused_and_untouched(fit, tmp_path, recorder):
    with somebody_in(tmp_path / "run") as owner:
        before = listing(tmp_path)
        with pytest.raises(DirectoryInUseError, match=f"process {owner.pid} ") as refusal:
            fit(recorder(tmp_path / "run"), default_root_dir=tmp_path / "root")
        assert len(str(refusal.value).splitlines()) == 1
        assert listing(tmp_path / "run") == [name[4:] for name in before if name != "run"]
    fit(recorder(tmp_path / "run"))
    assert rows(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize("logger", [False, Shared()], ids=["no logger", "no folder for each run"])
def test_lightnings_own_checkpoints_lie_in_the_run_directory(fit, tmp_path, monkeypatch, logger):
    monkeypatch.chdir(tmp_path)
    trainer = fit(logger=logger, default_root_dir=None, enable_checkpointing=True)
    directory = run_directory(trainer)
    assert directory == tmp_path / "lightning_logs" / "version_0"
    assert [path.parent for path in tmp_path.rglob("*.ckpt")] == [directory / "checkpoints"]


def test_a_named_version_that_is_in_use_is_refused_and_untouched(fit, tmp_path):
    with somebody_in(tmp_path / "a" / "b"), pytest.raises(DirectoryInUseError):
        fit(logger=TensorBoardLogger(tmp_path, name="a", version="b"))
    assert listing(tmp_path / "a" / "b") == ["owner.lock"]


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_a_number_that_another_run_took_at_the_same_time_is_left_to_it(fit, tmp_path, make):
    logger = make(tmp_path, name="a")
    assert logger.version == 0  # Lightning has looked, and before it writes somebody else begins
    _ = logger.experiment
    with somebody_in(tmp_path / "a" / "version_0"):
        (tmp_path / "a" / "version_1").mkdir()
        fit(logger=logger)
    assert rows(tmp_path / "a" / "version_2") == [1, 2, 3]
    assert listing(tmp_path / "a" / "version_0") == ["owner.lock"]
    written = [path.name for path in (tmp_path / "a" / "version_2").iterdir()]
    assert any(name.startswith(("events", "metrics")) for name in written)


@pytest.mark.parametrize("logger", [False, Shared()])
def test_a_run_whose_loggers_have_no_folder_for_it_makes_one(fit, tmp_path, monkeypatch, logger):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("mine")
    made = [run_directory(fit(logger=logger, default_root_dir=tmp_path)) for _ in range(2)]
    assert made == [tmp_path / "lightning_logs" / f"version_{n}" for n in (0, 1)]
    assert [rows(directory) for directory in made] == [[1, 2, 3]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "lightning_logs"]
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_root_of_its_own_is_the_runs_unless_another_run_has_it(fit, tmp_path):
    fit(default_root_dir=tmp_path / "root")
    assert rows(tmp_path / "root") == [1, 2, 3]
    with somebody_in(tmp_path / "root"):
        trainer = fit(default_root_dir=tmp_path / "root")
    assert run_directory(trainer) == tmp_path / "root" / "lightning_logs" / "version_0"
    assert rows(run_directory(trainer)) == [1, 2, 3]


def test_each_run_in_a_root_has_a_directory_of_its_own(fit, tmp_path, caplog):
    root = tmp_path / "root"
    made = [run_directory(fit(default_root_dir=root)) for _ in range(3)]
    assert made == [root, *(root / "lightning_logs" / f"version_{n}" for n in (0, 1))]
    assert [rows(directory) for directory in made] == [[1, 2, 3]] * 3
    assert not list(root.rglob("*.1"))
    assert caplog.text.count("has the files of an earlier run") == 2


@pytest.mark.parametrize("name", ["last.ckpt", "state.ckpt"])
def test_a_root_with_somebody_elses_files_is_not_given_to_a_run(fit, tmp_path, name):
    last = tmp_path / "root" / "checkpoints" / name
    last.parent.mkdir(parents=True)
    last.write_text("mine")
    callbacks = [FlightRecorder(watch=False), LastCheckpoint()]
    trainer = fit(*callbacks, default_root_dir=tmp_path / "root", enable_checkpointing=True)
    assert run_directory(trainer) == tmp_path / "root" / "lightning_logs" / "version_0"
    assert [path.name for path in last.parent.iterdir()] == [name]
    assert last.read_text() == "mine"


def test_the_first_logger_with_a_folder_counts(fit, tmp_path):
    trainer = fit(logger=[Shared(), CSVLogger(tmp_path, name="a", version="b")])
    assert run_directory(trainer) == tmp_path / "a" / "b"


def test_all_callbacks_of_a_trainer_write_into_one_directory(fit, tmp_path):
    logger = CSVLogger(tmp_path / "logs")
    callbacks = [History(), FlightRecorder(tmp_path / "run", watch=False), LastCheckpoint()]
    fit(*callbacks, logger=logger, enable_checkpointing=True)
    assert rows(tmp_path / "run") == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert not list((tmp_path / "logs").rglob("rank0"))


def test_a_profiler_follows_the_run_into_the_directory_that_was_made_for_it(
    fit, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
    profiler = PyTorchProfiler(schedule=schedule, export_to_chrome=True)
    trainer = fit(profiler=profiler, default_root_dir=tmp_path)
    assert list(run_directory(trainer).glob("*.pt.trace.json*"))
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_logs"]


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("recorder", [FlightRecorder, History])
def test_a_run_that_is_over_lets_its_directory_go(fit, tmp_path, recorder, dies):
    callback = recorder(tmp_path)
    with pytest.raises(RuntimeError, match="injected") if dies else contextlib.nullcontext():
        fit(callback, act=raise_at(1) if dies else None)
    trainer = fit(recorder(tmp_path))  # in this process
    del trainer
    code = OWNER.replace("sys.stdin.readline()", "")
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert other.returncode == 0


def test_a_trainer_may_fit_again_and_not_while_another_has_its_directory(fit, tmp_path):
    trainer = fit(FlightRecorder(tmp_path, watch=False))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Plain(), DataLoader(torch.ones(3, 4)))
    assert rows(tmp_path) == [1, 2, 3, 4, 5, 6]
    held = claim(tmp_path)
    with pytest.raises(DirectoryInUseError, match=f"this process, {os.getpid()}"):
        trainer.fit(Plain(), DataLoader(torch.ones(3, 4)))
    held.release()


def test_two_runs_in_threads_of_one_process_do_not_share_a_directory(fit, tmp_path):
    inside, go_on = threading.Event(), threading.Event()

    class Waits(Callback):
        def on_train_start(self, trainer, pl_module):
            inside.set()
            go_on.wait(60)

    first = threading.Thread(target=fit, args=(History(tmp_path), Waits()))
    first.start()
    try:
        assert inside.wait(60)
        with pytest.raises(DirectoryInUseError, match="another run of this process"):
            fit(History(tmp_path))
    finally:
        go_on.set()
        first.join()
    assert rows(tmp_path) == [1, 2, 3]


def test_nothing_is_claimed_under_fast_dev_run(fit, tmp_path):
    trainer = fit(fast_dev_run=True)
    assert run_directory(trainer) is None
    assert listing(tmp_path) == []


@pytest.mark.parametrize("recorder", [FlightRecorder, History])
def test_a_directory_has_a_name(recorder):
    with pytest.raises(ValueError, match=f"{recorder.__name__}.dirpath must name a directory"):
        recorder("")


def test_a_disk_that_takes_no_directory_ends_no_run(fit, tmp_path):
    (tmp_path / "file").touch()
    assert fit(History(tmp_path / "file" / "run")).global_step == 3


class TestLoggersElsewhere:
    """A module that asks for its run directory before loggers write, as PPO does."""

    @pytest.fixture
    def begin(self, make_trainer, tmp_path):
        held = []

        def begin(logger, run="run"):
            callbacks = [History(tmp_path / run)]
            trainer = make_trainer(callbacks=callbacks, logger=logger)
            trainer.state.status = TrainerStatus.RUNNING
            begin_run_directory(trainer)
            open_run_directory(trainer)
            held.append(trainer)
            return trainer

        yield begin
        for trainer in held:
            end_run(trainer)

    @pytest.mark.parametrize("folder", ["logs", "run", "run/below"])
    @pytest.mark.parametrize("name", ["metrics.csv", "hparams.yaml"])
    def test_replace_no_file_of_the_user(self, begin, tmp_path, folder, name):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        before = listing(tmp_path)
        with pytest.raises(DirectoryRefusedError, match="which no run wrote"):
            begin(CSVLogger(tmp_path, folder, ""))
        assert listing(tmp_path) == before
        assert path.read_text() == "mine"

    def test_a_folder_has_one_living_run_and_then_the_next(self, begin, tmp_path):
        first = begin(CSVLogger(tmp_path, "logs", ""), "a")
        first.logger.log_metrics({"x": 1})
        first.logger.save()
        with pytest.raises(DirectoryInUseError, match="folder of a logger must be free"):
            begin(CSVLogger(tmp_path, "logs", ""), "b")
        assert (tmp_path / "logs" / "metrics.csv").exists()
        end_run(first)
        begin(CSVLogger(tmp_path, "logs", ""), "b")
        assert not (tmp_path / "logs" / "metrics.csv").exists()
        assert (tmp_path / "logs" / "metrics.csv.1").read_text().splitlines()[0] == "step,x"

    def test_with_numbers_take_the_next_one(self, begin, tmp_path):
        loggers = [CSVLogger(tmp_path), CSVLogger(tmp_path)]
        assert [logger.version for logger in loggers] == [0, 0]
        for logger, run in zip(loggers, "ab", strict=True):
            begin(logger, run)
        assert [logger.version for logger in loggers] == [0, 1]

    def test_may_share_a_folder_within_a_run(self, begin, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path)
        loggers = [TensorBoardLogger(tmp_path, "a", 0), CSVLogger(tmp_path / "link", "a", 0)]
        trainer = begin(loggers)
        end_run(trainer)
        begin_run_directory(trainer)  # for a second fit
        assert listing(tmp_path / "a") == ["version_0", "version_0/owner.lock"]

    def test_that_cannot_be_claimed_are_refused_only_with_files_that_would_be_lost(
        self, begin, tmp_path, monkeypatch, caplog
    ):
        def refuses(folder, files):
            raise OSError(errno.ENOSPC, "No space left")

        monkeypatch.setattr(directory_choice, "claim_for_logger", refuses)
        (tmp_path / "logs").mkdir()
        begin(CSVLogger(tmp_path, "logs", ""), "a")
        assert "The folder of CSVLogger cannot be claimed" in caplog.text
        (tmp_path / "logs" / "metrics.csv").write_text("mine")
        with pytest.raises(DirectoryRefusedError, match="must be one that can be claimed"):
            begin(CSVLogger(tmp_path, "logs", ""), "b")
        assert (tmp_path / "logs" / "metrics.csv").read_text() == "mine"
