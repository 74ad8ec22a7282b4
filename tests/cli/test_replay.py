"""Mistakes in the words of ``esper replay`` are one line, and start no run."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from esper_lightning.cli import replay as command
from esper_lightning.cli.main import main
from esper_lightning.forensics.fingerprint import Fingerprint
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.replay import Verdict

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"


@pytest.fixture
def dead(tmp_path) -> Path:
    """A run that died before its first iteration, with a config."""
    files = RunLayout(tmp_path / "run").rank(0)
    files.directory.mkdir(parents=True)
    for path in (RUNS / "terminated" / "rank0").iterdir():
        (files.directory / path.name).write_bytes(path.read_bytes())
    RunLayout(tmp_path / "run").config.write_text("model: {}\ntrainer: {}\n")
    return tmp_path / "run"


class Refused:
    """A process whose settings are refused."""

    def wait(self, timeout):
        return 2


def said(capsys, *words: object) -> tuple[str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["replay", *map(str, words)])
    assert caught.value.code == 2
    return capsys.readouterr()


def test_a_mistake_is_one_line(dead, tmp_path, capsys):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"esper_lightning": {"iteration": "1"}}, tmp_path / "wrong.ckpt")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    words = {
        "RUN_DIR must hold a run that died": (RUNS / "cartpole",),
        "RUN_DIR must": (tmp_path / "nothing",),
        "ckpt_path must name a whole checkpoint": (dead, "--ckpt_path", tmp_path / "text.ckpt"),
        "ckpt_path must name a checkpoint of": (dead, "--ckpt_path", tmp_path / "wrong.ckpt"),
        "--ckpt_path must be absent with --from_start": (
            dead,
            *("--from_start", "--ckpt_path", tmp_path / "text.ckpt"),
        ),
        "--run_dir must name a new or empty": (dead, "--run_dir", tmp_path / "used"),
    }
    for text, given in words.items():
        out, err = said(capsys, *given)
        assert (out, err.count("\n"), text in err) == ("", 1, True), err


@pytest.mark.parametrize(
    "content",
    [
        *("model: 3", "- 1", "model: {}\ntrainer:", "a: [", "[" * 3000 + "]" * 3000),
        "model: &m {a: *m}\ntrainer: {}",
        "model: {a: 2024-99-99}\ntrainer: {}",
        "#" * 300_000,
    ],
    ids=lambda content: content[:20],
)
def test_a_damaged_config_is_one_line(dead, capsys, content):
    RunLayout(dead).config.write_text(content)
    out, err = said(capsys, dead)
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("content", [{}, {"advantage": 3}, "text"])
def test_a_minibatch_with_wrong_content_is_one_line(dead, capsys, content):
    path = RunLayout(dead).rank(0).bad_minibatch
    torch.save(content, path)
    torch.save({"state_dict": [3]}, RunLayout(dead).rank(0).crash_checkpoint)
    out, err = said(capsys, dead, "--minibatch")
    assert (out, err.count("\n")) == ("", 1)


def test_what_the_run_refuses_is_said_by_it_alone(dead, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Refused())
    assert said(capsys, dead)[1] == ""


@pytest.fixture
def configs(monkeypatch) -> list[dict[str, Any]]:
    """The configs of the replays that are started; every replay is refused."""
    found = []

    def start(words, **_):
        found.append(yaml.safe_load(Path(words[-1]).read_text()))
        return Refused()

    monkeypatch.setattr(subprocess, "Popen", start)
    return found


def test_a_progress_bar_of_the_run_stays(dead, capsys, configs):
    """Lightning refuses a bar among the callbacks where bars are switched off."""
    bar = "lightning.pytorch.callbacks.TQDMProgressBar"
    RunLayout(dead).config.write_text(
        f"model: {{}}\ntrainer: {{callbacks: {{class_path: {bar}}}, enable_progress_bar: null}}\n"
    )
    said(capsys, dead)
    trainer = configs[0]["trainer"]
    assert trainer["enable_progress_bar"] is None
    assert trainer["callbacks"][0]["class_path"] == bar


def test_directories_of_hosts_may_come_in_any_order(dead, capsys, configs):
    there = RunLayout(dead.with_name("there")).rank(1)
    shutil.copytree(RunLayout(dead).rank(0).directory, there.directory)
    for files, rank in ((RunLayout(dead).rank(0), 0), (there, 1)):
        record = ProcessRecord.load(files.process)
        replace(record, rank=rank, world_size=2).write(files.process)
    said(capsys, there.directory.parent, dead)
    (watch,) = (c for c in configs[0]["trainer"]["callbacks"] if "ReplayWatch" in c["class_path"])
    assert watch["init_args"]["run_dir"] == str(dead)
    assert watch["init_args"]["more_dirs"] == [str(there.directory.parent)]
    assert configs[0]["trainer"]["devices"] == 2


def test_a_class_of_the_program_is_replayed_in_python(dead, capsys):
    RunLayout(dead).config.write_text("model: {env: __main__.Maze}\ntrainer: {}\n")
    _, err = said(capsys, dead)
    assert "got __main__.Maze. Call esper_lightning.replaying.replay" in err


def test_variables_without_a_whole_value_are_named_and_not_restored(dead, capsys, monkeypatch):
    files, found = RunLayout(dead).rank(0), []
    variables = {"TORCH_LOGS_FORMAT": "(hidden)", "NCCL_ALGO": "Ring", "XLA_FLAGS": "own"}
    record = ProcessRecord.load(files.process)
    replace(record, fingerprint=Fingerprint(variables=variables)).write(files.process)
    monkeypatch.setenv("XLA_FLAGS", "of this shell")

    def start(words, *, env, **_):
        found.append(env)
        return Refused()

    monkeypatch.setattr(subprocess, "Popen", start)
    assert (
        "Not restored, because no whole value is on record: TORCH_LOGS_FORMAT."
        in said(capsys, dead)[0]
    )
    assert "TORCH_LOGS_FORMAT" not in found[0]
    assert (found[0]["NCCL_ALGO"], found[0]["XLA_FLAGS"]) == ("Ring", "of this shell")


@pytest.mark.parametrize("given", ["", "/of/this/shell"])
def test_a_replay_finds_the_modules_beside_the_program_of_the_run(
    dead, tmp_path, capsys, monkeypatch, given
):
    files, found = RunLayout(dead).rank(0), []
    record = ProcessRecord.load(files.process)
    places = Fingerprint(search_path=(str(tmp_path), str(tmp_path / "gone")))
    replace(record, fingerprint=places).write(files.process)
    monkeypatch.setenv("PYTHONPATH", given)

    def start(words, *, env, **_):
        found.append(env)
        return Refused()

    monkeypatch.setattr(subprocess, "Popen", start)
    said(capsys, dead)
    assert found[0]["PYTHONPATH"] == f"{given}{':' if given else ''}{tmp_path}"


@pytest.mark.parametrize(("given", "pinned"), [("auto", 1), (-1, 1), ([3], [3]), ([0, 1], 1)])
def test_a_replay_has_as_many_ranks_as_the_run_had(dead, capsys, configs, given, pinned):
    trainer = {"devices": given, "num_nodes": 2}
    RunLayout(dead).config.write_text(yaml.safe_dump({"model": {}, "trainer": trainer}))
    said(capsys, dead)
    assert configs[0]["trainer"]["devices"] == pinned
    assert configs[0]["trainer"]["num_nodes"] == 1


@pytest.mark.parametrize("arguments", ["[1]", "text", "3", "{dirpath: 3}", "{dirpath: [x]}"])
def test_wrong_arguments_of_a_callback_are_left_to_the_run(dead, capsys, configs, arguments):
    callback = f"{{class_path: History, init_args: {arguments}}}"
    RunLayout(dead).config.write_text(f"model: {{}}\ntrainer: {{callbacks: {callback}}}\n")
    said(capsys, dead)
    assert configs[0]["trainer"]["callbacks"][0] == yaml.safe_load(callback)


@pytest.mark.parametrize("outcome", ["different", "undecided"])
def test_a_deep_replay_needs_one_that_went_as_the_run_did(dead, monkeypatch, outcome):
    played = []

    def play(plan, *_):
        played.append(plan.deep)
        return Verdict(outcome, 3, 1, "", ())

    def plan(*_, deep=False, **__):
        return SimpleNamespace(deep=deep, begins=1, iteration=6)

    monkeypatch.setattr(command, "plan_replay", plan)
    monkeypatch.setattr(command, "_play", play)
    with pytest.raises(SystemExit) as caught:
        main(["replay", "--deep", str(dead)])
    assert (caught.value.code, played) == (command.STATUSES[outcome], [False])


def test_a_folder_within_the_dead_run_is_not_that_of_the_replay(dead, capsys, monkeypatch, configs):
    callbacks = (
        "[{class_path: esper_lightning.FlightRecorder, init_args: {dirpath: ~/run}},"
        " {class_path: esper_lightning.History, init_args: {dirpath: ~/other}}]"
    )
    RunLayout(dead).config.write_text(f"model: {{}}\ntrainer: {{callbacks: {callbacks}}}\n")
    monkeypatch.setenv("HOME", str(dead.parent))
    said(capsys, dead)
    places = [each["init_args"].get("dirpath") for each in configs[0]["trainer"]["callbacks"]]
    assert places == [None, "~/other", None]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_process_of_the_replay_first(monkeypatch, name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    monkeypatch.setattr(command, "_HEARD_S", 0.2)
    with command._stops_are_exits() as stops:
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        status = stops.run([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    assert (status, stops.stopped_by) == (-signal.SIGTERM, name)
    assert signal.getsignal(number) == before


def test_a_signal_before_the_process_is_there_is_an_exit(dead, monkeypatch):
    monkeypatch.setattr(command, "plan_replay", lambda *_, **__: os.kill(os.getpid(), 15))
    with pytest.raises(SystemExit) as caught:
        main(["replay", str(dead)])
    assert caught.value.code == 143


@pytest.mark.parametrize("has_begun", [True, False])
@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_replay_that_has_not_said_what_it_is_has_a_verdict(
    dead, tmp_path, capsys, monkeypatch, is_stopped, has_begun
):
    """A callback of the user's has died in its ``setup``, or a signal has ended the replay."""
    new, temporary = tmp_path / "new", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    class Process:
        def wait(self, timeout):
            if has_begun:
                shutil.copytree(RunLayout(dead).rank(0).directory, RunLayout(new).rank(0).directory)
            if is_stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            return 1

        def terminate(self):
            pass

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Process())
    with pytest.raises(SystemExit) as caught:
        main(["replay", str(dead), "--run_dir", str(new)])
    out, err = capsys.readouterr()
    assert not list(temporary.iterdir())
    if is_stopped:
        assert (caught.value.code, err) == (5, "")
        assert "Undecided" in out
        assert "SIGTERM" in out
    elif has_begun:
        assert (caught.value.code, err) == (0, "")
        assert "Reproduced: iteration 6, rank 0" in out
    else:
        assert (caught.value.code, err.count("\n")) == (2, 1)
