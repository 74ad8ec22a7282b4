"""W&B and MLflow: a resumed run continues its curve, and files follow the run.

The services are stand-ins that have the attributes of Lightning's loggers; the slow tests use the
real libraries, offline.
"""

import contextlib
import errno
import json
import time
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esper_lightning import PPO, PPOConfig, Trainer
from esper_lightning.callbacks import tracking
from esper_lightning.cli.main import main
from esper_lightning.envs import CartPole
from esper_lightning.forensics.layout import OF_A_RUN

STEPS = 32  # env steps of an iteration


def ppo(iterations=6) -> PPO:
    config = PPOConfig(rollout_steps=8, minibatches=2, epochs=1)
    return PPO(
        CartPole(num_envs=4),
        ppo=config,
        total_env_steps=STEPS * iterations,
        iterations_per_epoch=2,
        eval_episodes=2,
        compile="off",
    )


class DiesIn(Callback):
    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.iteration == self.iteration:
            raise RuntimeError("windy")


def fit(run, *loggers, dies_in=None, more=(), **kwargs):
    callbacks = [*more, *([] if dies_in is None else [DiesIn(dies_in)])]
    trainer = Trainer(
        run_dir=run,
        logger=list(loggers),
        callbacks=callbacks,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    trainer.fit(ppo(), **kwargs)
    return trainer


def die_and_resume(run, make):
    """Two attempts of a run, each with a logger of its own: the first dies in iteration 5."""
    first = make()
    with pytest.raises(RuntimeError, match="windy"):
        fit(run, first, dies_in=4)
    second = make()
    fit(run, second, ckpt_path="last")
    return first, second


class WandB(Logger):
    """What Lightning's logger for W&B has, with runs in a dictionary.

    ``save`` makes links in the folder ``dir``, and the service writes a ``config.yaml`` there.
    """

    runs: dict = {}  # noqa: RUF012
    name, version = "wandb", None

    def __init__(self):
        super().__init__()
        self._experiment = None
        self._save_dir = "."
        self._wandb_init = {"id": None, "dir": "."}
        self._id = None

    save_dir = property(lambda self: self._save_dir)

    @property
    def experiment(self):
        if self._experiment is None:
            self.id = self._wandb_init["id"] or f"run-{len(self.runs)}"
            self.config = self.runs.setdefault(self.id, {"rows": [], "files": []})
            self.dir = str(Path(self._save_dir, "wandb", f"run-{id(self)}", "files"))
            Path(self.dir).mkdir(parents=True)
            self._experiment = self
        return self._experiment

    def update(self, values, allow_val_change):  # of ``experiment.config``
        raise NotImplementedError

    def save(self, path=None, base_path=None, policy=None):
        if path is not None:
            self.runs[self.id]["files"].append(Path(path).name)
            there = Path(self.dir, Path(path).relative_to(base_path))
            if not (there.exists() and there.samefile(path)):
                there.unlink(missing_ok=True)
                there.symlink_to(path)

    def finalize(self, status):
        if self._experiment is not None:
            Path(self.dir, "config.yaml").write_text("_wandb: {}")

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.runs[self.id]["rows"].append(step)


@pytest.fixture
def wandb_stand_in(monkeypatch):
    """The stand-in, without runs."""

    class Config(dict):
        def update(self, values, allow_val_change):
            super().update(values)

    monkeypatch.setattr(WandB, "runs", {})
    own = WandB.experiment.fget

    def experiment(self):
        run = own(self)
        self.config = Config(self.runs[self.id])
        return run

    monkeypatch.setattr(WandB, "experiment", property(experiment))
    return WandB


@pytest.mark.parametrize("dies_in", [None, 3])
def test_no_file_of_a_run_is_what_a_service_writes_into(wandb_stand_in, tmp_path, dies_in):
    run = tmp_path / "run"
    with pytest.raises(RuntimeError) if dies_in else contextlib.nullcontext():
        fit(run, wandb_stand_in(), dies_in=dies_in)
    names = {path.name for path in run.iterdir()} - {"owner.lock", "wandb"}
    known = {name for name in names for pattern in OF_A_RUN if fnmatch(name, pattern)}
    assert {name for name in names - known if not name.startswith(".")} == set()
    copies = [path for path in run.glob("wandb/*/files/*") if path.name != "config.yaml"]
    assert {"run_config.yaml", "best.ckpt"} <= {path.name for path in copies}
    assert not any(path.is_symlink() for path in run.rglob("*"))
    (copy,) = (path for path in copies if path.name == "run_config.yaml")
    assert (run / "config.yaml").read_bytes() == copy.read_bytes()
    assert "model:" in copy.read_text()


class Unreachable(WandB):
    """W&B whose service is out of reach until ``reached`` is set."""

    reached = False

    @property
    def experiment(self):
        if not self.reached:
            raise ConnectionError("no network")
        return WandB.experiment.fget(self)

    def log_metrics(self, metrics, step=None):
        _ = self.experiment
        super().log_metrics(metrics, step)


class Reaches(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.logger.reached = pl_module.iteration == 3 or trainer.logger.reached


@pytest.mark.parametrize("reaches", [True, False])
def test_a_service_that_is_out_of_reach_at_the_start_ends_no_run(
    wandb_stand_in, tmp_path, caplog, reaches
):
    run, logger = tmp_path / "run", Unreachable()
    trainer = fit(run, logger, more=[Reaches()] if reaches else [])
    assert trainer.global_step == 6
    assert len((run / "rank0" / "history.jsonl").read_text().splitlines()) == 6
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [text for text in warnings if "no network" in text] == [
        "Unreachable failed: no network. Training continues."
    ]
    if not reaches:
        assert WandB.runs == {}
        return
    (found,) = WandB.runs.values()
    assert sorted(set(found["rows"])) == [STEPS * k for k in range(1, 7)]
    assert found["files"] == ["run_config.yaml", "best.ckpt"]
    assert json.loads((run / "trackers.json").read_text()) == {"wandb": logger.id}


def test_identifiers_that_cannot_be_written_end_no_run(
    wandb_stand_in, tmp_path, caplog, monkeypatch
):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracking, "write_atomically", full)
    assert fit(tmp_path / "run", wandb_stand_in()).global_step == 6
    assert "No space left on device. Training continues." in caplog.text


def test_a_resumed_run_continues_under_its_identifier_and_files_follow(wandb_stand_in, tmp_path):
    run = tmp_path / "run"
    first, second = die_and_resume(run, wandb_stand_in)
    assert first.id == second.id
    (found,) = WandB.runs.values()
    assert json.loads((run / "trackers.json").read_text()) == {"wandb": first.id}
    assert sorted(set(found["rows"])) == [STEPS * k for k in range(1, 7)]
    assert second._save_dir == str(run)
    assert found["files"].count("run_config.yaml") == 2
    assert found["files"].index("crash.zip") < found["files"].index("best.ckpt")
    with zipfile.ZipFile(run / "crash.zip") as file:
        assert "windy" in file.read("rank0/crash.json").decode()


def test_a_new_run_in_the_same_directory_is_a_new_run_of_the_service(wandb_stand_in, tmp_path):
    first, second = wandb_stand_in(), wandb_stand_in()
    for logger in (first, second):
        fit(tmp_path / "run", logger)
    assert first.id != second.id


def test_a_new_run_has_not_the_death_of_the_run_before(wandb_stand_in, tmp_path):
    run, dead, healthy = tmp_path / "run", wandb_stand_in(), wandb_stand_in()
    with pytest.raises(RuntimeError, match="windy"):
        fit(run, dead, dies_in=3)
    fit(run, healthy)
    assert "crash.zip" in WandB.runs[dead.id]["files"]
    assert "best.ckpt" in WandB.runs[healthy.id]["files"]
    assert "crash.zip" not in WandB.runs[healthy.id]["files"]
    assert not (run / "crash.zip").exists()


def test_files_of_the_user_are_not_replaced(wandb_stand_in, tmp_path):
    for name in ("trackers.json", "crash.zip", "copies.jsonl"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("the user's")
        with pytest.raises(ValueError, match=f"It holds {name}, which no run wrote"):
            fit(folder, wandb_stand_in())
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "the user's"


def test_an_identifier_of_the_user_is_not_replaced(wandb_stand_in, tmp_path):
    fit(tmp_path / "run", wandb_stand_in(), dies_in=None)
    logger = wandb_stand_in()
    logger._wandb_init["id"] = "mine"
    fit(tmp_path / "run", logger, ckpt_path="last")
    assert logger.id == "mine"


def test_a_service_that_takes_no_files_ends_no_run(wandb_stand_in, tmp_path, caplog, monkeypatch):
    def fails(self, path=None, **kwargs):
        if path is not None:
            raise ConnectionError("no network")

    monkeypatch.setattr(WandB, "save", fails)
    trainer = fit(tmp_path / "run", wandb_stand_in())
    assert trainer.global_step == 6
    assert "no network. Training continues." in caplog.text


def test_tensorboard_has_the_config_as_text_and_no_metric_that_is_none(tmp_path):
    trainer = Trainer(run_dir=tmp_path / "run", accelerator="cpu", enable_progress_bar=False)
    trainer.fit(ppo(2))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    assert "hp_metric" not in tags["scalars"]
    assert tags["histograms"] == []
    assert tags["tensors"] == ["config/text_summary"]
    (text,) = events.Tensors("config/text_summary")
    assert "    model:" in text.tensor_proto.string_val[0].decode()


def records(content):
    """Records of a file of W&B: a log of LevelDB, with seven bytes of W&B before it."""
    pieces, at = b"", 7
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        pieces += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger  # noqa: PLC0415
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415

    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"

    def make():
        import wandb  # noqa: PLC0415

        wandb.finish()
        return WandbLogger(project="test", offline=True)

    first, second = die_and_resume(run, make)
    second.experiment.finish()
    assert first.version == second.version
    attempts = sorted(run.glob(f"wandb/offline-run-*/run-{first.version}.wandb"))
    assert len(attempts) == 2

    def steps():
        for content in (each for path in attempts for each in records(path.read_bytes())):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            row = {item.key or item.nested_key[0]: item for item in record.history.item}
            if "loss/policy" in row:
                yield json.loads(row["trainer/global_step"].value_json)

    expected, until = [STEPS * k for k in range(1, 7)], time.monotonic() + 60.0
    while [*steps()] != expected and time.monotonic() < until:
        time.sleep(0.5)  # another process writes the file
    assert [*steps()] == expected
    uploaded = {path.name for path in run.glob("wandb/offline-run-*/files/*")}
    assert {"best.ckpt", "crash.zip", "run_config.yaml"} <= uploaded
    assert not [path for path in run.glob("wandb/*/files/*") if path.is_symlink()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mlflow_itself_through_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    address = f"file:{tmp_path / 'mlruns'}"
    client = MlflowClient(address)  # which makes an empty store
    words = ["fit", "--config", "cartpole", "--trainer.accelerator=cpu", "--model.compile=off"]
    words += ["--model.env.num_envs", "4", "--model.ppo.rollout_steps", "8"]
    words += ["--model.ppo.minibatches", "2", "--model.eval_episodes", "2", "--run_dir", "run"]
    words += ["--trainer.logger", "MLFlowLogger", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.logger.tracking_uri", address, "--ckpt_path", "last"]

    def files():
        found = (path for path in (tmp_path / "mlruns").rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in found}

    before = files()
    main([*words, "--dry_run", "true"])
    assert files() == before
    for iterations in (2, 4):
        main([*words, "--model.total_env_steps", str(STEPS * iterations)])
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss/policy")]
    assert steps == [STEPS * k for k in range(1, 5)]
    before = files()
    main([*words, "--dry_run", "true"])
    with pytest.raises(SystemExit):  # a refused start
        main([*words, "--model.env.num_envs", "8"])
    assert files() == before
    assert "must be the checkpoint's" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mlflow_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger  # noqa: PLC0415
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    address = f"file:{tmp_path / 'mlruns'}"
    run = tmp_path / "run"
    first, second = die_and_resume(run, lambda: MLFlowLogger("test", tracking_uri=address))
    assert first.run_id == second.run_id
    client = MlflowClient(address)
    steps = [metric.step for metric in client.get_metric_history(first.run_id, "loss/policy")]
    assert sorted(set(steps)) == [STEPS * k for k in range(1, 7)]
    found = client.get_run(first.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["run_dir"] == str(run)
    artifacts = {each.path for each in client.list_artifacts(first.run_id)}
    assert {"best.ckpt", "crash.zip", "config.yaml"} <= artifacts
