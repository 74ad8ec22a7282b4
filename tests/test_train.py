"""``train_ppo_vectorized``: one call, its files, its profiler, its errors."""

import dataclasses
import gzip
import inspect
import json
import logging
import os
import re

import pytest
import yaml

from esper_lightning import MLP, PPO, RND, PPOConfig, train_ppo_vectorized
from esper_lightning.callbacks.checkpoints import LastCheckpoint
from esper_lightning.envs import CartPole
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.ppo.metrics import EVAL_RETURN
from esper_lightning.training import evaluation, module
from esper_lightning.training.publish import publish
from esper_lightning.training.settings import PPOSettings
from tests.disks import fill

SMALL = PPOConfig(rollout_steps=4, minibatches=2, epochs=1)


@pytest.fixture
def train(tmp_path):
    def run(iterations=3, **settings):
        defaults = {"ppo": SMALL, "policy": MLP(hidden_sizes=(8,)), "device": "cpu"}
        defaults["run_dir"] = tmp_path / "run"
        return train_ppo_vectorized(
            CartPole(num_envs=4), iterations=iterations, **{**defaults, **settings}
        )

    return run


def test_returns_the_rows_that_are_on_disk(train, tmp_path):
    rows = train()
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows == read_json_lines(tmp_path / "run" / "rank0" / "history.jsonl")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "checkpoints", "rank0"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_lightning_says_nothing_of_absent_hardware_and_of_products(train, caplog, monkeypatch):
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, log.name)
    train(iterations=1)
    assert caplog.messages == []
    assert log.level == logging.INFO


class BuiltError(Exception):
    """Raised in place of the run, once the module is built."""


SETTINGS = {  # of the module, for an argument of ``train_ppo_vectorized`` that is not the default
    "env": (CartPole(num_envs=3), {"env": CartPole(num_envs=3), "total_env_steps": 3 * 4 * 3}),
    "iterations": (5, {"total_env_steps": 5 * 4 * 4}),
    "ppo": (PPOConfig(rollout_steps=8), {"ppo": PPOConfig(rollout_steps=8), "total_env_steps": 96}),
    "policy": (MLP(hidden_sizes=(9,)), {"policy": MLP(hidden_sizes=(9,))}),
    "seed": (7, {"seed": 7}),
    "devices": (2, {"total_env_steps": 2 * 3 * 4 * 4}),
    "compile": ("default", {"compile": "default"}),
    "evaluate_every": (6, {"iterations_per_epoch": 6}),
    "eval_episodes": (8, {"eval_episodes": 8}),
    "extensions": ((RND(),), {"extensions": (RND(),)}),
    "redeal": (True, {"redeal": True}),
}
OF_THE_RUN = ("device", "run_dir", "save_path", "resume_path")  # and those of the profiler
ONLY_OF_PPO = {"warm_start"}


@pytest.mark.parametrize("name", inspect.signature(train_ppo_vectorized).parameters)
def test_every_argument_that_is_a_setting_of_ppo_reaches_the_module(name, monkeypatch):
    if name in OF_THE_RUN or name.startswith("torch_profiler"):
        assert name not in PPOSettings.names()
        return
    built = []

    def build(*args, **kwargs):
        built.append(PPO(*args, **kwargs).settings)
        raise BuiltError

    monkeypatch.setattr("esper_lightning.train.PPO", build)
    given = {"env": CartPole(num_envs=4), "iterations": 3, "ppo": SMALL}
    value, changes = SETTINGS[name]
    for arguments in (given, given | {name: value}):
        with pytest.raises(BuiltError):
            train_ppo_vectorized(**arguments)
    assert built[0] == PPOSettings(env=given["env"], ppo=SMALL, total_env_steps=3 * 4 * 4)
    assert built[1] == dataclasses.replace(built[0], **changes) != built[0]


def test_every_setting_of_ppo_can_be_reached():
    reached = {name for _, changes in SETTINGS.values() for name in changes}
    assert reached | ONLY_OF_PPO == set(PPOSettings.names())


def test_makes_a_new_run_directory_each_time(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train(run_dir=None)
    for version in (0, 1):
        path = tmp_path / "runs" / "cartpole" / f"version_{version}" / "rank0" / "history.jsonl"
        assert len(read_json_lines(path)) == 3


def test_config_repeats_the_run(train, tmp_path):
    train(seed=3)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["env"]["init_args"] == {"num_envs": 4, "time_limit": 500}
    assert (config["model"]["seed"], config["model"]["ppo"]["rollout_steps"]) == (3, 4)


def test_last_stands_for_the_run_in_the_directory(train, tmp_path):
    for iterations in (2, 4):
        rows = train(iterations, run_dir=tmp_path / "mine", resume_path="last")
        assert [row["iteration"] for row in rows] == [*range(1, iterations + 1)]
    assert not list((tmp_path / "mine").rglob("history.jsonl.*"))


def test_saves_and_resumes(train, tmp_path):
    whole = train(6, run_dir=tmp_path / "whole")
    train(3, save_path=tmp_path / "saved" / "x.ckpt")
    assert PPO.load_from_checkpoint(tmp_path / "saved" / "x.ckpt").iteration == 3
    rows = train(6, resume_path=tmp_path / "saved" / "x.ckpt")

    def timeless(rows):
        return [
            {k: v for k, v in r.items() if k not in ("time_s", "env_steps_per_s")} for r in rows
        ]

    assert timeless(rows) == timeless(whole)


METRICS = evaluation.evaluation_metrics


def scores(monkeypatch, *values):
    """Returns that evaluations are made to find."""
    left = iter(values)
    monkeypatch.setattr(
        evaluation, "evaluation_metrics", lambda *each: METRICS(*each) | {EVAL_RETURN: next(left)}
    )


def test_saves_the_best_policy(train, tmp_path, monkeypatch):
    scores(monkeypatch, 1.0, 5.0, 2.0)
    path = tmp_path / "saved.ckpt"
    train(6, save_path=path, evaluate_every=2, eval_episodes=3)
    assert PPO.load_from_checkpoint(path).iteration == 4
    assert (
        PPO.load_from_checkpoint(path.parent / "run" / "checkpoints" / "last.ckpt").iteration == 6
    )
    (first, *_) = read_json_lines(tmp_path / "run" / "rank0" / "evaluations.jsonl")
    assert first["eval/episodes"] == 3
    scores(monkeypatch, 4.0)
    train(
        8,
        resume_path=path.parent / "run" / "checkpoints" / "last.ckpt",
        evaluate_every=2,
        eval_episodes=3,
        run_dir=tmp_path / "other",
        save_path=path,
    )
    assert PPO.load_from_checkpoint(path).iteration == 4


def test_an_evaluation_that_is_not_due_before_the_end_is_at_the_end(train, tmp_path):
    train(3, save_path=tmp_path / "saved.ckpt", evaluate_every=10, eval_episodes=2)
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    assert PPO.load_from_checkpoint(tmp_path / "saved.ckpt").iteration == 3


@pytest.mark.parametrize(
    ("dies_at", "evaluate_every", "saved"), [(6, 2, 2), (6, None, None), (2, 2, None)]
)
def test_saves_what_there_is_when_it_dies(
    train, tmp_path, monkeypatch, dies_at, evaluate_every, saved
):
    scores(monkeypatch, 5.0, 1.0)

    def dies(trainer, row):
        publish(trainer, row)
        if row["iteration"] == dies_at:
            raise RuntimeError("injected")

    monkeypatch.setattr(module, "publish", dies)
    path = tmp_path / "saved.ckpt"
    with pytest.raises(RuntimeError, match="injected") as caught:
        train(8, save_path=path, evaluate_every=evaluate_every)
    missing = [note for note in caught.value.__notes__ if "saved.ckpt" in note]
    if saved is None:
        assert missing == [
            f"save_path={str(path)!r} was not written: the run had no checkpoint yet"
        ]
        assert not path.exists()
    else:
        assert missing == []
        assert PPO.load_from_checkpoint(path).iteration == saved


def test_an_error_is_not_masked_by_a_place_that_takes_no_file(train, tmp_path, monkeypatch):
    def dies(*_):
        (tmp_path / "place").write_text("")
        raise ZeroDivisionError

    scores(monkeypatch, 5.0, 1.0)
    monkeypatch.setattr(LastCheckpoint, "on_train_epoch_end", dies)
    with pytest.raises(ZeroDivisionError) as caught:
        train(4, save_path=tmp_path / "place" / "x.ckpt", evaluate_every=2)
    assert any("was not written" in note for note in caught.value.__notes__)


PLACES = ["file/x.ckpt", "folder", "/proc/none/x.ckpt", "/proc/x.ckpt", "a\0b", "x" * 300]


@pytest.mark.parametrize("place", [*PLACES, f"new/{'x' * 250}", "notes.txt", "fifo", "dangling"])
def test_a_place_that_takes_no_file_is_refused_before_training(train, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("PK is how an archive begins")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.iterdir())
    rule = r"^train_ppo_vectorized.save_path must name a new file or an earlier checkpoint, got '"
    with pytest.raises(ValueError, match=rule):
        train(4, save_path=tmp_path / place)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "notes.txt").read_text() == "PK is how an archive begins"


def test_a_place_for_a_file_is_not_made_for_a_run_that_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="resume_path must name an existing"):
        train(4, save_path=tmp_path / "new" / "x.ckpt", resume_path="nope")
    assert not (tmp_path / "new").exists()


def test_an_earlier_checkpoint_is_replaced_through_a_link_that_stays(train, tmp_path):
    path, link = tmp_path / "saved.ckpt", tmp_path / "link.ckpt"
    link.symlink_to("saved.ckpt")
    train(1, save_path=path)
    train(2, save_path=link, run_dir=tmp_path / "other")
    assert link.is_symlink()
    assert PPO.load_from_checkpoint(path).iteration == 2


def test_a_folder_of_others_is_no_run_directory(train, tmp_path):
    (tmp_path / "root" / "etc").mkdir(parents=True)
    (tmp_path / "root" / "etc" / "passwd").write_text("")
    rule = "The run directory must name a new directory or that of a run, got"
    with pytest.raises(ValueError, match=f"{rule} '.*It holds etc, which no run"):
        train(1, run_dir=tmp_path / "root")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["etc"]


def test_what_a_launcher_leaves_is_no_reason_to_refuse_a_run_directory(train, tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / "slurm-1.out").write_text("")
    assert len(train(1)) == 1


def trace_names(path):
    trace = json.loads(gzip.decompress(path.read_bytes()))
    return {event.get("name") for event in trace["traceEvents"]}


@pytest.mark.parametrize(
    ("wait", "warmup", "active", "iterations"), [(1, 1, 3, 8), (0, 1, 1, 3), (0, 0, 1, 1)]
)
def test_profiler_leaves_a_trace_and_a_table(
    train, tmp_path, capfd, wait, warmup, active, iterations
):
    settings = {"torch_profiler_wait": wait, "torch_profiler_warmup": warmup}
    settings["torch_profiler_active"] = active
    train(iterations, torch_profiler=True, torch_profiler_summary=True, **settings)
    (trace,) = (tmp_path / "run" / "rank0" / "trace").iterdir()
    assert {"rollout", "advantages", "update"} <= {
        name.removeprefix("[pl][profile]") for name in trace_names(trace) if name
    }
    table = (tmp_path / "run" / "rank0" / "profile.txt").read_text()
    assert "Self CPU" in table
    shown = capfd.readouterr()
    assert "Self CPU" in shown.out
    assert "Self CPU" not in shown.err  # once is enough


def test_profiler_writes_where_it_is_told(train, tmp_path):
    train(6, torch_profiler=True, torch_profiler_dir=tmp_path / "traces")
    assert len(list((tmp_path / "traces").glob("*.pt.trace.json.gz"))) == 1
    assert not (tmp_path / "run" / "rank0" / "trace").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "train_ppo_vectorized.iterations must be at least 1, got 0."),
        (
            {"torch_profiler": True, "torch_profiler_wait": 2, "iterations": 3},
            "torch_profiler_wait + torch_profiler_warmup must be less than iterations = 3, got 3.",
        ),
        ({"evaluate_every": 0}, "train_ppo_vectorized.evaluate_every must be at least 1, got 0."),
        (
            {"save_path": "/"},
            "train_ppo_vectorized.save_path must name a new file or an earlier",
        ),
        (
            {"run_dir": "/proc/x"},
            "train_ppo_vectorized.run_dir must be a folder that can be made (",
        ),
        (
            {"run_dir": "x" * 300},
            "train_ppo_vectorized.run_dir must be a folder that can be made (File name too long)",
        ),
        *(
            (
                {name: value},
                f"train_ppo_vectorized.{name} must name a directory, got {value!r}.",
            )
            for name in ("run_dir", "torch_profiler_dir")
            for value in ("", "a\0b")
        ),
        ({"eval_episodes": 0}, "PPO.eval_episodes must be at least 1, got 0."),
    ],
)
def test_settings_that_cannot_work(train, settings, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        train(**settings)


def test_resuming_from_nothing(train, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"resume_path must name an existing checkpoint, got '.*none'",
    ):
        train(resume_path=tmp_path / "none")
    (tmp_path / "torn").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"resume_path must name a whole .*, got '.*torn'"):
        train(resume_path=tmp_path / "torn")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_settings_of_the_run_before(train, small_disk):
    run = small_disk / "run"
    train(2, run_dir=run)
    before = {path.name: path.read_bytes() for path in run.glob("config.yaml*")}
    fill(small_disk)
    with pytest.raises(OSError, match="No space"):
        train(2, run_dir=run, seed=1, ppo=PPOConfig(rollout_steps=8, minibatches=2, epochs=1))
    assert {path.name: path.read_bytes() for path in run.glob("config.yaml*")} == before


def test_event_files_that_no_run_wrote_are_refused(train, tmp_path):
    path = tmp_path / "run" / "events.out.tfevents.1.mine.1.0"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"It holds events\.out\.\S+, which no run"):
        train(2)
    assert [path.name for path in path.parent.iterdir()] == [path.name]


def test_an_error_says_where_the_evidence_is(train, tmp_path, monkeypatch):
    def dies(trainer, row):
        if row["iteration"] == 3:
            raise RuntimeError("injected")

    monkeypatch.setattr(module, "publish", dies)
    with pytest.raises(RuntimeError, match="injected") as caught:
        train(5)
    (note,) = caught.value.__notes__
    assert str(tmp_path / "run" / "rank0" / "history.jsonl") in note
    assert len(read_json_lines(tmp_path / "run" / "rank0" / "history.jsonl")) == 2
    monkeypatch.undo()
    assert len(train(2, run_dir=tmp_path / "next")) == 2


@pytest.mark.parametrize("path", [3, None])
def test_what_is_no_path_is_no_checkpoint(path):
    with pytest.raises(ValueError, match=rf"^ckpt_path must be a path, got {path}\.$"):
        PPO.load_from_checkpoint(path)
