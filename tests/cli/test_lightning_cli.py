"""``esper fit`` and ``esper evaluate`` as a user meets them."""

import errno
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins import TorchCheckpointIO

from esper_lightning import AtomicCheckpointIO
from esper_lightning.callbacks import run_directory
from esper_lightning.cli.lightning_cli import EsperCLI
from esper_lightning.cli.main import main
from esper_lightning.envs import CartPole, Morphogenesis
from esper_lightning.envs.adapters import named
from esper_lightning.envs.autoreset import AutoresetEnv
from esper_lightning.envs.morphogenesis.population import Population
from esper_lightning.forensics.claims import claim_for_logger
from esper_lightning.forensics.files import read_json_lines

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
OVERLAYS = ("debug_profile", "ddp")  # go on top of another config
ELSEWHERE = ("breakout", "space_invaders", "mjlab_cartpole")  # ``make worlds`` has their packages
CARTPOLE = str(Path(__file__).parents[2] / "configs" / "cartpole.yaml")
CIFAR10 = CARTPOLE.replace("cartpole", "morphogenesis_cifar10")
CIFAR10_MIXED = CARTPOLE.replace("cartpole", "cifar10_mixed")
DIGITS_MIXED = CARTPOLE.replace("cartpole", "digits_mixed")
GROWTH = CARTPOLE.replace("cartpole", "morphogenesis")
PENDULUM = CARTPOLE.replace("cartpole", "pendulum")
_NEVER = object()
QUICK = (
    *(
        "--model.env.num_envs",
        "4",
        "--model.ppo.rollout_steps",
        "8",
        "--model.ppo.minibatches",
        "2",
    ),
    *(
        "--model.total_env_steps",
        "64",
        "--model.eval_episodes",
        "3",
        "--trainer.accelerator",
        "cpu",
    ),
)


def test_a_measurement_replaces_no_other_file(capsys):
    Path("notes").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--config", CARTPOLE, "--output", "notes"])
    assert (caught.value.code, Path("notes").read_text()) == (2, "mine")
    err = capsys.readouterr().err
    assert "--output must name a new file or an earlier file of esper bench, got 'notes'." in err


@pytest.mark.parametrize("words", [(), ("--run_dir=new/run",)])
def test_a_run_whose_first_file_cannot_be_written_leaves_no_folder(words, monkeypatch, capsys):
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.EFBIG, "File too large", str(path))

    monkeypatch.setattr(run_directory, "replace_keeping", full)
    said = fails(capsys, "fit", "--config", CARTPOLE, *words)
    assert "must be a folder that can be made (File too large), got " in said
    assert list(Path().iterdir()) == []


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["esper"])


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    "config",
    [
        path
        for path in CONFIGS
        if path.stem not in (*OVERLAYS, *ELSEWHERE) and str(path) not in (CIFAR10, CIFAR10_MIXED)
    ],
    ids=lambda path: path.stem,
)
def test_every_config_trains_one_iteration(config, capsys):
    spec = yaml.safe_load(config.read_text())["model"]
    steps = 4 * spec["ppo"]["rollout_steps"]
    settings = ["--model.total_env_steps", str(steps), "--model.eval_episodes", "2"]
    settings += ["--model.env.num_envs", "4", "--model.ppo.epochs", "1"]
    main(["fit", "--config", str(config), *settings, "--trainer.accelerator", "cpu"])
    (history,) = Path().glob("runs/*/version_0/rank0/history.jsonl")
    assert [row["env_steps"] for row in read_json_lines(history)] == [steps]


@pytest.mark.parametrize("config", [CIFAR10, CIFAR10_MIXED])
def test_hosts_are_grown_on_cifar10_as_the_guide_says(config, cifar10_folder, capsys):
    few = {"num_envs": 2, "epochs": 2, "train_batches": 2, "batch_size": 8}
    settings = [f"--model.env.{name}={value}" for name, value in few.items()]
    settings += ["--model.ppo.rollout_steps=2", "--model.ppo.minibatches=2"]
    settings += [
        "--model.total_env_steps=4",
        "--model.eval_episodes=2",
        "--trainer.accelerator=cpu",
    ]
    main(["fit", "--config", config, "--model.env.folder", str(cifar10_folder), *settings])
    (history,) = Path().glob("runs/*/version_0/rank0/history.jsonl")
    assert [row["env_steps"] for row in read_json_lines(history)] == [4]


def tuples_in(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        (CIFAR10, Morphogenesis.cifar10("x")),
        (CIFAR10_MIXED, Morphogenesis.cifar10_mixed("x")),
        (DIGITS_MIXED, Morphogenesis.digits_mixed()),
    ],
)
def test_the_configs_of_growth_are_the_presets(config, preset):
    found = yaml.safe_load(Path(config).read_text())["model"]["env"]["init_args"]
    found = tuples_in(found)
    if "population" in found:
        found["population"] = Population(**tuples_in(found["population"]))
    data = {"folder": preset.folder, "image": preset.image}
    assert Morphogenesis(**found, **data) == replace(preset, num_envs=found["num_envs"])


def test_fit_names_the_task_of_a_simulator(capsys, monkeypatch):
    """And ``evaluate`` its package where that is missing, which ``export`` does not need."""
    task = ["--model.env", "Gymnasium", "--model.env.id", "CartPole-v1"]
    main(["fit", *task, *QUICK])
    said = capsys.readouterr().out.splitlines()
    assert said[-3].startswith("CartPole-v1: mean return ")
    assert said[-1] == "Run directory: runs/cartpole-v1/version_0"
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    for spaces in ({**named._probed}, {}):  # known to this process, and not
        monkeypatch.setattr(named, "_probed", spaces)
        line = fails(capsys, "evaluate", "--ckpt_path", "runs/cartpole-v1/version_0")
        assert "needs gymnasium: pip install 'esper_lightning[gymnasium]'" in line
    main(["export", "--ckpt_path", "runs/cartpole-v1/version_0", "--output", "policy.pt2"])
    assert Path("policy.pt2").is_file()


def test_fit_says_what_it_learned_and_where_it_is(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK])
    said = capsys.readouterr().out.splitlines()
    assert said[-3].startswith("CartPole: mean return ")
    assert said[-3].endswith(" over 3 deterministic evaluation episodes")
    assert said[-2].startswith("Trained for 64 env steps in ")
    assert said[-1] == "Run directory: runs/cartpole/version_0"
    run = Path("runs/cartpole/version_0")
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "rank0/history.jsonl",
        "rank0/evaluations.jsonl",
    } <= found


def test_the_config_in_the_run_directory_repeats_the_run(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK])
    main(["fit", "--config", "runs/cartpole/version_0/config.yaml"])
    first, second = (
        read_json_lines(Path(f"runs/cartpole/version_{version}/rank0/history.jsonl"))
        for version in (0, 1)
    )
    assert [row["loss/value"] for row in first] == [row["loss/value"] for row in second]


class Remembers(Callback):
    """A callback with a default that YAML cannot hold."""

    def __init__(self, since: Any = _NEVER) -> None:
        assert since is _NEVER


def test_the_config_holds_defaults_of_classes_that_are_no_plain_text(capsys):
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": None}},
        {"class_path": f"{__name__}.Remembers"},
    ]
    main(["fit", "--config", CARTPOLE, *QUICK, f"--trainer.callbacks={json.dumps(callbacks)}"])
    written = "runs/cartpole/version_0/config.yaml"
    held = yaml.safe_load(Path(written).read_text())["trainer"]["callbacks"]
    assert held[0]["init_args"] == {"duration": None, "interval": "step", "verbose": True}
    main(["fit", "--config", written, "--run_dir", "again"])
    assert yaml.safe_load(Path("again/config.yaml").read_text())["trainer"]["callbacks"] == held


def test_evaluate_needs_a_checkpoint_and_nothing_else(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK])
    trained = capsys.readouterr().out.splitlines()[-3]
    path = "runs/cartpole/version_0/checkpoints/last.ckpt"
    main(["evaluate", "--ckpt_path", path])
    assert capsys.readouterr().out.splitlines() == [trained]
    main(["evaluate", f"--ckpt_path={path}", "--model.eval_episodes", "5"])
    assert capsys.readouterr().out.endswith("over 5 deterministic evaluation episodes\n")
    assert [path.name for path in Path("runs/cartpole").iterdir()] == ["version_0"]


def test_resumes(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK])
    ckpt = ["--ckpt_path", "runs/cartpole/version_0/checkpoints/last.ckpt"]
    main(["fit", "--config", CARTPOLE, *QUICK, *ckpt, "--model.total_env_steps", "128"])
    rows = read_json_lines(Path("runs/cartpole/version_1/rank0/history.jsonl"))
    assert [row["env_steps"] for row in rows] == [96, 128]


def test_barebones(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK, "--trainer.barebones", "true"])
    assert "Trained for 64 env steps" in capsys.readouterr().out


def test_fast_dev_run_leaves_nothing(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK, "--trainer.fast_dev_run", "true"])
    assert list(Path().iterdir()) == []


def test_without_evaluation(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK, "--trainer.limit_val_batches", "0"])
    assert "mean return" not in capsys.readouterr().out
    checkpoints = Path("runs/cartpole/version_0/checkpoints")
    assert [path.name for path in checkpoints.iterdir()] == ["last.ckpt"]


def test_users_own_callbacks_and_loggers(capsys):
    arguments = [
        *("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "mine"),
        *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename", "own"),
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "loss/value"),
    ]
    main(["fit", "--config", CARTPOLE, *QUICK, *arguments])
    assert capsys.readouterr().out.endswith("Run directory: mine/lightning_logs/version_0\n")
    run = Path("mine/lightning_logs/version_0")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["own.ckpt"]
    assert (run / "metrics.csv").is_file()
    assert (run / "rank0" / "history.jsonl").is_file()


def test_what_a_callback_refuses_before_the_first_iteration_is_a_mistake_in_the_settings(
    capsys, monkeypatch
):
    def refuses(*_):
        raise MisconfigurationException("the callback cannot work")

    monkeypatch.setattr(LearningRateMonitor, "on_train_start", refuses)
    words = ["--trainer.callbacks+=LearningRateMonitor"]
    line = fails(capsys, "fit", "--config", CARTPOLE, *QUICK, *words)
    assert "the callback cannot work" in line


def test_what_a_class_of_a_setting_raises_before_the_first_iteration_is_a_line(capsys, monkeypatch):
    cannot = Mock(side_effect=TypeError("cannot work"))
    monkeypatch.setattr(LearningRateMonitor, "_find_names_from_schedulers", cannot)
    words = ["--trainer.callbacks+=LearningRateMonitor"]
    line = fails(capsys, "fit", "--config", CARTPOLE, *QUICK, *words)
    assert "LearningRateMonitor: TypeError: cannot work" in line


def test_users_own_history_and_bar_replace_ours(capsys):
    arguments = [
        "--trainer.callbacks+=esper_lightning.History",
        "--trainer.callbacks+=TQDMProgressBar",
    ]
    main(["fit", "--config", CARTPOLE, *QUICK, *arguments])
    assert len(read_json_lines(Path("runs/cartpole/version_0/rank0/history.jsonl"))) == 2


def test_help_describes_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(
        "usage: esper fit [--config CONFIG] [--SETTING VALUE ...] Train a model"
    )
    order = ("--run_dir", "--model.env ENV", "--model.ppo.clip", "--print_config", "--help_trainer")
    places = [shown.index(word) for word in order]
    assert places == sorted(places)
    assert "--trainer" not in shown
    assert "--model.ppo.rollout_steps ROLLOUT_STEPS Number of steps ``T`` that every" in shown
    assert "Greatest change of the probability ratio" in shown


def test_lightnings_settings_are_described_on_request(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--help_trainer"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--trainer.accelerator ACCELERATOR" in shown
    assert "--model" not in shown


def test_print_config_can_be_used_as_a_config(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", CARTPOLE, *QUICK, "--print_config"])
    assert caught.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    main(["fit", "--config", "printed.yaml"])
    assert len(read_json_lines(Path("runs/cartpole/version_0/rank0/history.jsonl"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.env.validation_size", "401"], "must be at most 400 for 'digits', got 401."),
        (["--model.env.dataset", "cifar10"], "Morphogenesis.folder must be given for 'cifar10'"),
        (
            ["--model.env.dataset", "cifar10", "--model.env.folder", "nowhere"],
            "Morphogenesis.folder must hold CIFAR-10, got 'nowhere'. Download https://",
        ),
    ],
)
def test_data_that_is_not_there_is_missed_before_a_run_begins(capsys, arguments, message):
    assert message in fails(capsys, "fit", "--config", GROWTH, *arguments)
    assert not Path("runs").exists()


def test_checkpoints_of_others(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK])
    capsys.readouterr()
    ckpt = ["--ckpt_path", "runs/cartpole/version_0/checkpoints/last.ckpt"]
    line = fails(capsys, "fit", "--config", CARTPOLE, *QUICK, *ckpt, "--model.env", "MountainCar")
    assert "PPO.env must be the checkpoint's, 'esper_lightning.envs.cartpole.CartPole'" in line
    for other in (["--config", PENDULUM], ["--model.env", "Acrobot"]):
        line = fails(capsys, "evaluate", *other, *ckpt)
        assert "PPO.env must be the checkpoint's" in line
    line = fails(capsys, "evaluate", *ckpt, "--model.policy.hidden_sizes", "[32]")
    assert "PPO.policy.hidden_sizes must be the checkpoint's, [64, 64], got [32]." in line


class TestGoingOn:
    def test_last_goes_on_in_the_newest_run(self, capsys):
        for budget in ("64", "32"):  # the newer run is version_1
            main(["fit", "--config", CARTPOLE, *QUICK, "--model.total_env_steps", budget])
        resume = ["--ckpt_path", "last", "--model.total_env_steps", "96"]
        main(["fit", "--config", CARTPOLE, *QUICK, *resume])
        assert capsys.readouterr().out.splitlines()[-1].endswith("runs/cartpole/version_1")
        rows = read_json_lines(Path("runs/cartpole/version_1/rank0/history.jsonl"))
        assert [row["env_steps"] for row in rows] == [32, 64, 96]
        assert len(list(Path("runs/cartpole").iterdir())) == 2

    def test_last_begins_where_there_is_none_and_says_so(self, capsys):
        for budget in ("32", "64"):
            resume = ["--ckpt_path", "last", "--run_dir", "elsewhere"]
            resume += ["--model.total_env_steps", budget]
            main(["fit", "--config", CARTPOLE, *QUICK, *resume])
            said = capsys.readouterr().out.splitlines()[0]
            begins = "No checkpoint to resume from: a new run begins."
            assert (said == begins) is (budget == "32")
        rows = read_json_lines(Path("elsewhere/rank0/history.jsonl"))
        assert [row["env_steps"] for row in rows] == [32, 64]
        assert not Path("runs").exists()

    @pytest.mark.parametrize("run_dir", [(), ("--run_dir", "here")])
    @pytest.mark.parametrize("logger", ["false", "lightning.pytorch.loggers.CSVLogger"])
    def test_last_goes_on_whatever_the_logger(self, capsys, logger, run_dir):
        words = ["fit", "--config", CARTPOLE, *QUICK, "--trainer.logger", logger, *run_dir]
        words += [] if logger == "false" else ["--trainer.logger.save_dir", "logs"]
        for budget in ("32", "64"):
            main([*words, "--model.total_env_steps", budget, "--ckpt_path", "last"])
            is_new = "No checkpoint to resume from" in capsys.readouterr().out
            assert is_new is (budget == "32")
        histories = list(Path().rglob("history.jsonl"))
        assert [row["env_steps"] for row in read_json_lines(histories[0])] == [32, 64]
        assert len(histories) == 1
        line = fails(capsys, *words, "--model.env.num_envs", "8", "--ckpt_path", "last")
        assert "must be the checkpoint's" in line

    def test_a_run_directory_beside_a_logger(self, capsys):
        logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger"]
        logger += ["--trainer.logger.save_dir", "logs"]
        main(["fit", "--config", CARTPOLE, *QUICK, *logger, "--run_dir", "here"])
        assert capsys.readouterr().out.endswith("Run directory: here\n")
        assert Path("here/rank0/history.jsonl").is_file()
        assert Path("here/checkpoints/last.ckpt").is_file()
        assert Path("logs/lightning_logs/version_0/metrics.csv").is_file()

    def test_the_users_own_files_are_never_replaced(self, capsys):
        Path("config.yaml").write_text(Path(CARTPOLE).read_text())
        before = Path("config.yaml").read_text()
        main(["fit", "--config", "config.yaml", *QUICK, "--trainer.logger", "false"])
        assert capsys.readouterr().out.endswith("Run directory: runs/cartpole/version_0\n")
        assert Path("runs/cartpole/version_0/checkpoints/last.ckpt").is_file()
        for _ in range(2):
            message = fails(capsys, "fit", "--config", "config.yaml", *QUICK, "--run_dir", ".")
            assert "It holds config.yaml and 1 more, which no run wrote." in message
        assert sorted(path.name for path in Path().iterdir()) == ["config.yaml", "runs"]
        assert Path("config.yaml").read_text() == before

    def test_the_users_own_files_beside_a_logger_elsewhere_are_never_replaced(self, capsys):
        logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "."]
        logger += ["--trainer.logger.name", "", "--trainer.logger.version", ""]
        words = ["fit", "--config", CARTPOLE, *QUICK, "--run_dir", "run", *logger]
        mine = {"metrics.csv": "step\n1\n", "hparams.yaml": "mine: 1\n"}
        for name, text in mine.items():
            Path(name).write_text(text)
        message = fails(capsys, *words)
        assert "folder of a logger must name a new directory or that of a run, got" in message
        assert message.rstrip().endswith("It holds hparams.yaml and 1 more, which no run wrote.")
        assert {path.name: path.read_text() for path in Path().iterdir()} == mine
        for name in mine:
            Path(name).unlink()
        for _ in range(2):
            main(words)
        assert Path("metrics.csv").is_file()
        assert Path("metrics.csv.1").is_file()
        Path("config.yaml").write_text("mine")  # the folder is no run directory for that
        capsys.readouterr()
        message = fails(capsys, "fit", "--config", CARTPOLE, *QUICK, "--run_dir", ".")
        assert "which no run wrote." in message
        assert Path("config.yaml").read_text() == "mine"
        held = claim_for_logger(Path(), [])
        assert "folder of a logger must be free, got" in fails(capsys, *words[:-9], "new", *logger)
        held.release()
        assert not Path("new").exists()

    def test_an_empty_owner_lock_of_the_user_makes_no_run_directory(self, capsys):
        Path("owner.lock").touch()
        Path("config.yaml").write_text("mine")
        message = fails(capsys, "fit", "--config", CARTPOLE, *QUICK, "--run_dir", ".")
        assert "It holds config.yaml, which no run wrote." in message
        found = {path.name: path.read_text() for path in Path().iterdir()}
        assert found == {"owner.lock": "", "config.yaml": "mine"}

    def test_a_run_directory_that_takes_no_file_is_named(self, capsys, monkeypatch):
        def no_room(*_):
            raise OSError(errno.EFBIG, "File too large")

        monkeypatch.setattr(run_directory, "replace_keeping", no_room)
        message = fails(capsys, "fit", "--config", CARTPOLE, *QUICK)
        path = Path("runs/cartpole/version_0").absolute()
        assert f"can be made (File too large), got '{path}'." in message

    def test_a_run_directory_has_a_name(self, capsys):
        message = fails(capsys, "fit", "--config", CARTPOLE, *QUICK, "--run_dir", "")
        assert "--run_dir must name a directory, got ''." in message

    def test_a_config_that_differs_from_the_runs_is_set_beside_it(self):
        here = ["fit", "--config", CARTPOLE, *QUICK, "--run_dir", "here"]
        main(here)
        first = Path("here/config.yaml").read_text()
        main([*here, "--model.seed", "7"])
        assert Path("here/config.yaml.1").read_text() == first
        assert "seed: 7" in Path("here/config.yaml").read_text()

    def test_a_checkpoint_of_other_ranks(self, capsys):
        main(["fit", "--config", CARTPOLE, *QUICK])
        capsys.readouterr()
        last = "runs/cartpole/version_0/checkpoints/last.ckpt"
        ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        message = fails(capsys, "fit", "--config", CARTPOLE, *QUICK, *ranks, "--ckpt_path", last)
        assert "num_nodes must be 1 (or set PPO.redeal), got 2." in message
        assert "PPO(warm_start=PATH)" in message

    def test_a_warm_start_takes_weights_and_nothing_else(self):
        main(["fit", "--config", CARTPOLE, *QUICK])
        last = "runs/cartpole/version_0/checkpoints/last.ckpt"
        nothing = ["--model.ppo.learning_rate", "1e-30", "--model.ppo.rollout_steps", "16"]
        main(["fit", "--config", CARTPOLE, *QUICK, *nothing, "--model.warm_start", last])
        rows = read_json_lines(Path("runs/cartpole/version_1/rank0/history.jsonl"))
        assert [row["env_steps"] for row in rows] == [64]
        first, second = (
            torch.load(f"runs/cartpole/version_{number}/checkpoints/last.ckpt", weights_only=True)
            for number in range(2)
        )
        for name, value in first["state_dict"].items():
            torch.testing.assert_close(second["state_dict"][name], value, rtol=0, atol=1e-20)

    def test_a_warm_start_of_other_networks(self, capsys):
        main(["fit", "--config", CARTPOLE, *QUICK])
        last = "runs/cartpole/version_0/checkpoints/last.ckpt"
        other = ["--model.policy.hidden_sizes", "[8]", "--model.warm_start", last]
        capsys.readouterr()
        message = fails(capsys, "fit", "--config", CARTPOLE, *QUICK, *other)
        assert "PPO.warm_start must be of the same networks and normalisers" in message


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_files_that_are_no_checkpoints(capsys, command):
    main(["fit", "--config", CARTPOLE, *QUICK])
    capsys.readouterr()
    whole = Path("runs/cartpole/version_0/checkpoints/last.ckpt").read_bytes()
    torn, flipped = Path("torn.ckpt"), bytearray(whole)
    torn.write_bytes(whole[:-1000])
    flipped[len(whole) // 2] ^= 1
    Path("flipped.ckpt").write_bytes(flipped)
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.5.0"}, "other.ckpt")
    torch.save({"state_dict": Path("x")}, "code.ckpt")
    config = ["--config", CARTPOLE, *QUICK] if command == "fit" else []
    for path, said in {
        "torn.ckpt": "whole checkpoint, got 'torn.ckpt'. It is torn: its end is missing",
        "flipped.ckpt": "whole checkpoint, got 'flipped.ckpt'. It is damaged, in its entry '",
        "empty.ckpt": "whole checkpoint, got 'empty.ckpt'. It is empty.",
        "other.ckpt": "name a checkpoint of PPO, got 'other.ckpt'.",
        "code.ckpt": "only tensors and plain data, got 'code.ckpt'. It holds objects of pathlib",
        CARTPOLE: f"whole checkpoint, got '{CARTPOLE}'. It begins with b'# So', which is no",
    }.items():
        assert said in fails(capsys, command, *config, "--ckpt_path", path)


LOGGER = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "here")
SAME = (*LOGGER, "--trainer.logger.name", "", "--trainer.logger.version", "")


def test_a_torn_last(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK, *SAME])
    capsys.readouterr()
    path = Path("here/checkpoints/last.ckpt")
    again = ["fit", "--config", CARTPOLE, *QUICK, *SAME, "--ckpt_path", "last"]
    main([*again, "--model.total_env_steps", "96"])
    assert read_json_lines(Path("here/rank0/history.jsonl"))[-1]["env_steps"] == 96
    path.write_bytes(path.read_bytes()[:1000])
    capsys.readouterr()
    line = fails(capsys, *again)
    assert "must name a whole checkpoint" in line
    assert "here/checkpoints/last.ckpt" in line


def test_evaluate_takes_the_best_of_a_run(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK])
    capsys.readouterr()
    run = Path("runs/cartpole/version_0")
    main(["evaluate", "--ckpt_path", str(run)])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"Checkpoint: {run}/checkpoints/best.ckpt"
    assert second.startswith("CartPole: mean return ")
    (run / "checkpoints" / "best.ckpt").unlink()
    main(["evaluate", f"--ckpt_path={run}"])
    assert f"Checkpoint: {run}/checkpoints/last.ckpt\n" in capsys.readouterr().out
    (run / "checkpoints" / "last.ckpt").unlink()
    line = fails(capsys, "evaluate", "--ckpt_path", str(run))
    assert "a run directory with checkpoints/best.ckpt or last.ckpt, got 'runs/cartpole" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], AtomicCheckpointIO),
        (["--trainer.plugins+=LightningEnvironment"], AtomicCheckpointIO),
        (["--trainer.plugins", "TorchCheckpointIO"], TorchCheckpointIO),
        (
            [
                "--trainer.strategy",
                "SingleDeviceStrategy",
                "--trainer.strategy.device",
                "cpu",
                "--trainer.strategy.checkpoint_io",
                "TorchCheckpointIO",
            ],
            TorchCheckpointIO,
        ),
    ],
)
def test_users_own_way_of_writing_checkpoints(capsys, monkeypatch, arguments, expected):
    used = []
    monkeypatch.setattr(EsperCLI, "execute", lambda cli: used.append(cli.trainer.strategy))
    main(["fit", "--config", CARTPOLE, *QUICK, *arguments])
    assert type(used[0].checkpoint_io) is expected


def test_a_run_without_a_logger_writes_under_the_root_that_it_is_given(tmp_path):
    words = ["--trainer.logger", "false", "--trainer.default_root_dir", "root"]
    main(["fit", "--config", CARTPOLE, *QUICK, *words])
    runs = tmp_path / "root" / "runs" / "cartpole"
    assert (runs / "version_0" / "rank0" / "history.jsonl").exists()
    main(["fit", "--config", CARTPOLE, *QUICK, *words, "--ckpt_path", "last"])
    assert [path.name for path in runs.iterdir()] == ["version_0"]
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_the_config_is_not_there_before_it_is_whole(tmp_path, monkeypatch):
    """A kill while the file is written would leave a file without content."""
    dump, seen = LightningArgumentParser.dump, []

    def looking(*args, **kwargs):
        seen.extend(tmp_path.rglob("config.yaml"))
        return dump(*args, **kwargs)

    monkeypatch.setattr(LightningArgumentParser, "dump", looking)
    main(["fit", "--config", CARTPOLE, *QUICK, "--run_dir", "run"])
    assert seen == []
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["seed"] == 0


ENDLESS = [
    "[" * 5000,
    "model: &a [*a]",
    "model: {seed: " + "9" * 5000 + "}",
    "x" * 10**6,
    "pipe",
    "folder",
]


@pytest.mark.parametrize("content", ENDLESS, ids=lambda content: content[:15])
def test_a_config_that_cannot_be_read_is_one_line(capsys, content):
    path = Path("config.yaml")
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    else:
        path.write_text(content)
    line = fails(capsys, "fit", "--config", "config.yaml")
    assert "config.yaml" in line
    assert len(line) <= 200


def wrong(checkpoint, name):
    """A checkpoint with wrong content and right checksums."""
    weight = next(iter(checkpoint["state_dict"]))
    if name == "NaN":
        checkpoint["state_dict"][weight].view(-1)[0] = torch.nan
    elif name == "shape":
        checkpoint["state_dict"][weight] = torch.zeros(3)
    elif name == "settings":
        checkpoint["hyper_parameters"] = "text"
    elif name == "environments":
        checkpoint["esper_lightning"]["ranks"][0]["env"] = {"state": torch.zeros(2)}
    return checkpoint


@pytest.mark.parametrize("name", ["NaN", "shape", "settings"])
def test_a_checkpoint_of_wrong_content_is_one_line_everywhere(capsys, name):
    main(["fit", "--config", CARTPOLE, *QUICK])
    capsys.readouterr()
    path = "runs/cartpole/version_0/checkpoints/last.ckpt"
    torch.save(wrong(torch.load(path, weights_only=True), name), "wrong.ckpt")
    fit = ["fit", "--config", CARTPOLE, *QUICK]
    for arguments in (
        ["evaluate", "--ckpt_path", "wrong.ckpt"],
        ["export", "--ckpt_path", "wrong.ckpt", "--output", "x"],
        [*fit, "--ckpt_path", "wrong.ckpt"],
        [*fit, "--model.warm_start", "wrong.ckpt"],
    ):
        line = fails(capsys, *arguments)
        assert line.startswith("esper: error: ")
        assert len(line) <= 200
        assert name != "NaN" or "Not finite: " in line or "finite weights" in line
    assert not Path("x").exists()
    assert [path.name for path in Path("runs/cartpole").iterdir()] == ["version_0"]


def test_environments_that_cannot_be_taken_up_are_told_in_a_line(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK])
    path = "runs/cartpole/version_0/checkpoints/last.ckpt"
    torch.save(wrong(torch.load(path, weights_only=True), "environments"), "wrong.ckpt")
    capsys.readouterr()
    more = ["--ckpt_path", "wrong.ckpt", "--model.total_env_steps", "128"]
    for run_dir in ([], ["--run_dir", "a/b"], ["--run_dir", "runs/cartpole/version_0"]):
        with pytest.raises(SystemExit) as caught:
            main(["fit", "--config", CARTPOLE, *QUICK, *more, *run_dir])
        assert caught.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = [each for each in lines if each.startswith("esper: error: ")]
        assert "ckpt_path must hold what a run can resume from, got 'wrong.ckpt'" in line
    assert not Path("a").exists()
    assert [each.name for each in Path("runs/cartpole").iterdir()] == ["version_0"]
    assert Path("runs/cartpole/version_0/rank0/history.jsonl").exists()  # of the run before


def test_the_directory_of_another_users_run_is_refused_in_a_line(capsys, monkeypatch):
    words = ["fit", "--config", CARTPOLE, *QUICK, "--run_dir", "theirs"]
    main(words)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path("theirs").rglob("*")}

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)  # root, as in a container, may all
    line = fails(capsys, *words)
    assert line.startswith("esper: error: run_dir must be a folder that can be made (Permission")
    after = {path: path.stat().st_mtime_ns for path in Path("theirs").rglob("*")}
    assert {path.name for path in after if after[path] != before.get(path)} <= {"owner.lock"}


def test_a_run_that_a_users_environment_cannot_resume_leaves_its_report(monkeypatch):
    main(["fit", "--config", CARTPOLE, *QUICK, "--run_dir", "one"])

    def load_state_dict(*_):
        raise KeyError("forgotten")

    monkeypatch.setattr(AutoresetEnv, "load_state_dict", load_state_dict)
    words = ["--run_dir", "two", "--ckpt_path", "one/checkpoints/last.ckpt"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", CARTPOLE, *QUICK, *words, "--model.total_env_steps", "128"])
    assert "forgotten" in Path("two/rank0/crash.json").read_text()


def test_networks_that_would_take_all_memory_are_not_built(capsys):
    main(["fit", "--config", CARTPOLE, *QUICK])
    capsys.readouterr()
    checkpoint = torch.load("runs/cartpole/version_0/checkpoints/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["policy"]["init_args"]["hidden_sizes"] = [65536, 65536]
    torch.save(checkpoint, "huge.ckpt")
    for arguments in (["evaluate"], ["export", "--output", "x"]):
        line = fails(capsys, *arguments, "--ckpt_path", "huge.ckpt")
        assert "hyper_parameters must describe the networks of its weights" in line


def test_a_run_that_a_users_class_ends_with_status_0_has_not_succeeded(monkeypatch):
    monkeypatch.setattr(CartPole, "advance", lambda *_: sys.exit(0))
    words = ["fit", "--config", CARTPOLE, *QUICK, "--model.compile=off", "--run_dir=run"]
    with pytest.raises(SystemExit, match="has ended the process before the command was done"):
        main(words)
    assert Path("run/rank0/crash.json").exists()
