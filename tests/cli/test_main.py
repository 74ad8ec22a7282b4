"""``esper`` as a process: its streams, its signals, and where it finds modules."""

import errno
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper_lightning.cli.main import main as command_line
from esper_lightning.forensics.files import encode_rows, read_json_lines
from esper_lightning.forensics.layout import RunLayout
from tests.reports import write_report

CARTPOLE = str(Path(__file__).parents[2] / "configs" / "cartpole.yaml")
QUICK = ("--model.env.num_envs=4", "--model.ppo.rollout_steps=8", "--model.ppo.minibatches=2")
QUICK += ("--model.eval_episodes=2", "--trainer.accelerator=cpu")
FIT = ("fit", "--config", CARTPOLE, *QUICK)
# A console script: the directory of the script is the first in which modules are sought.
SCRIPT = """
import sys
from esper_lightning.cli import main as command

def prepare(words, then=command._prepare):
    print("began", file=sys.stderr, flush=True)
    return then(words)

command._prepare = prepare
command.main()
"""
TWICE = """
import sys
from esper_lightning.cli.main import main
split = sys.argv.index("evaluate")
main(sys.argv[1:split])
main(sys.argv[split:])
"""
FULL = "/dev/full"
NAME = "läuft"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "esper"
    path.write_text(SCRIPT)
    return [sys.executable, str(path)]


@pytest.fixture
def dead():
    """A run that died of an error that cannot be encoded, in a directory whose name is no UTF-8."""
    name = os.fsdecode(b"run-\xff")
    files = RunLayout(Path(name)).rank(0)
    files.directory.mkdir(parents=True)
    files.history.write_bytes(encode_rows([{"iteration": 1, "env_steps": 32, "a": "\ud800"}]))
    error = {"type": "ValueError", "message": "lone \ud800", "traceback": []}
    report = {"rank": 0, "time_s": 1.0, "cause": "exception", "error": error, "complete": True}
    write_report(files.crash, report)
    config = {"model": {"seed": 0, "env": {"class_path": "CartPole"}}}
    (Path(name) / "config.yaml").write_text(json.dumps(config))
    return name


def esper(*arguments, start=("-m", "esper_lightning"), **how) -> subprocess.CompletedProcess:
    command = [sys.executable, *start, *arguments]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.run(command, text=True, check=False, **how)


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def close(*descriptors):
    def before():
        for descriptor in descriptors:
            os.close(descriptor)

    return before


class TestStreams:
    @pytest.mark.parametrize("command", ["crash", "report"])
    @pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
    def test_what_cannot_be_encoded_is_printed_all_the_same(self, dead, command, encoding):
        done = esper(command, dead, env=os.environ | {"PYTHONIOENCODING": encoding})
        assert (done.returncode, done.stderr) == (0, "")
        assert r"run-\udcff" in done.stdout

    def test_a_reader_that_left_is_no_error(self, dead):
        for command in ("crash", "report", "--help"):
            done = esper(command, *([dead] if command[0] != "-" else []), stdout=closed_pipe())
            assert (done.returncode, done.stderr) == (0, "")

    def test_a_report_that_a_full_disk_did_not_take_is_not_a_success(self, dead):
        with open(FULL, "w") as full:  # noqa: PTH123
            for command in ("crash", "report"):
                done = esper(command, dead, stdout=full)
                said = "esper: what was printed is not whole: No space left on device\n"
                assert (done.returncode, done.stderr) == (1, said)

    def test_mistakes_need_no_stream(self):
        for how in ({"preexec_fn": close(1, 2)}, {"stderr": closed_pipe()}):
            assert esper("crash", "none", **how).returncode == 2

    def test_a_finished_run_does_not_fail_for_what_it_prints(self):
        """Closed pipes, in an encoding that knows no umlauts, then descriptors that are closed."""
        budget, run = ["--model.total_env_steps=64"], ["--run_dir", f"runs/{NAME}"]
        play = ["evaluate", "--ckpt_path", f"runs/{NAME}"]
        ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
        streams = {"stdout": closed_pipe(), "stderr": closed_pipe()}
        once = esper(*FIT, *budget, *run, *play, start=("-c", TWICE), env=ascii_only, **streams)
        assert once.returncode == 0
        run[1] = f"{run[1]}-2"
        again = esper(*FIT, *budget, *run, *play, start=("-c", TWICE), preexec_fn=close(0, 1, 2))
        assert again.returncode == 0
        for directory in Path("runs").iterdir():
            rows = read_json_lines(directory / "rank0" / "history.jsonl")
            assert [row["env_steps"] for row in rows] == [32, 64]
            assert not (directory / "rank0" / "crash.json").exists()
        assert len(list(Path("runs").iterdir())) == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("command", ["fit", "evaluate", "export"])
    def test_a_full_disk_behind_stdout_fails_no_run(self, command):
        run = ["--model.total_env_steps=64", "--run_dir", "run"]
        with open(FULL, "w") as full:  # noqa: PTH123
            assert esper(*FIT, *run, stdout=full).returncode == 0
            if command != "fit":
                output = ["--output", "policy"] if command == "export" else []
                done = esper(command, "--ckpt_path", "run", *output, stdout=full)
                assert done.returncode == 0
                assert "what was printed is not whole" in done.stderr


class TestInterrupts:
    def stopped(self, script, number, after_s, *arguments) -> subprocess.Popen:
        process = subprocess.Popen(
            [*script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr.readline() == "began\n"
            time.sleep(after_s)
            process.send_signal(number)
            process.said = process.communicate(timeout=60)
        finally:
            process.kill()
        return process

    @pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0, 2.0])
    def test_ctrl_c_in_the_first_seconds_is_status_1_without_a_traceback(self, script, after_s):
        process = self.stopped(script, signal.SIGINT, after_s, *FIT)
        assert process.returncode == 1
        assert "Traceback" not in process.said[1]

    def test_ctrl_c_during_imports_leaves_no_directory(self, script, tmp_path):
        run = tmp_path / "a" / "run"
        process = subprocess.Popen([*script, *FIT, "--run_dir", str(run)], stderr=subprocess.PIPE)
        try:
            while not (run / "owner.lock").exists() or not (run / "owner.lock").read_bytes():
                assert process.poll() is None
                time.sleep(0.001)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[1] == b"began\n"
        finally:
            process.kill()
        assert process.returncode == 1
        assert not (tmp_path / "a").exists()

    def test_ctrl_c_during_a_quick_command_leaves_no_traceback(self, script):
        process = self.stopped(script, signal.SIGINT, 0.0, "--help")
        assert process.returncode in (0, 1)  # it may have been faster
        assert process.said[1] == ""

    def test_sigterm_before_training_is_quiet(self, script):
        process = self.stopped(script, signal.SIGTERM, 0.1, *FIT)
        assert process.returncode == -signal.SIGTERM
        assert process.said == ("", "")


REFUSES = """
from dataclasses import dataclass
from esper_lightning.envs import CartPole

@dataclass(frozen=True, kw_only=True)
class Mine(CartPole):
    def __post_init__(self):
        raise ValueError("found")
"""


class TestModules:
    @pytest.mark.parametrize("start", ["script", "python -m"])
    def test_a_config_names_modules_here_and_files_here_replace_none_of_ours(self, script, start):
        Path("mine.py").write_text(REFUSES)
        for name in ("random", "yaml", "jsonargparse", "lightning", "numpy", "json"):
            Path(f"{name}.py").write_text("raise SystemExit('a file of the user')")
        begin = script[1:] if start == "script" else ("-m", "esper_lightning")
        done = esper(*FIT, "--model.env", "mine.Mine", start=begin)
        assert done.returncode == 2
        assert (
            done.stderr.removeprefix("began\n")
            == "esper: error: model.env: found (mine.py, line 8)\n"
        )

    def test_nothing_here_is_imported_in_safe_mode(self, script):
        Path("mine.py").write_text(REFUSES)
        done = esper(*FIT, "--model.env", "mine.Mine", start=("-P", *script[1:]))
        assert done.returncode == 2
        assert "No module named 'mine'" in done.stderr

    @pytest.mark.slow
    @pytest.mark.ddp
    def test_every_rank_finds_modules_here(self, script):
        Path("mine.py").write_text(REFUSES.replace('raise ValueError("found")', "pass"))
        ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--run_dir=run"]
        env = ["--model.env", "mine.Mine", "--model.total_env_steps=64"]
        done = esper(*FIT, *env, *ranks, start=script[1:])
        assert done.returncode == 0, done.stderr
        assert len(read_json_lines(Path("run/rank1/history.jsonl"))) == 1


def test_help_and_version_need_no_torch():
    blocked = (
        "import sys; sys.modules['torch'] = None; from esper_lightning.cli.main import main; main()"
    )
    for argument, said in {
        "--help": "usage: esper COMMAND",
        "-h": "compare   how variants did",
        "--version": "esper_lightning ",
    }.items():
        done = esper(argument, start=("-c", blocked))
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout


def test_a_kill_during_imports_leaves_the_name_of_the_process(tmp_path, capsys):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "esper_lightning", "fit", "--run_dir", str(run)]
    process = subprocess.Popen(command, cwd=tmp_path)
    while not (run / "owner.lock").exists() or not (run / "owner.lock").read_bytes():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    command_line(["crash", str(run)])
    vanished = "vanished while it was starting, before it could record anything."
    assert f"Process {process.pid} on " in (said := capsys.readouterr().out)
    assert said.rstrip().endswith(vanished)
    command_line(["crash", "--json", str(run)])
    assert json.loads(capsys.readouterr().out)["owner"]["pid"] == process.pid


def test_a_kill_during_imports_is_told_from_the_run_before(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "rank0").mkdir(parents=True)
    ended = {"rank": 0, "pid": os.getpid(), "state": "finished", "changed_s": 1e9}
    (run / "rank0" / "process.json").write_text(json.dumps(ended))
    (run / "owner.lock").touch()
    command_line(["crash", str(run)])
    assert "starting" not in capsys.readouterr().out
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    owner = {"pid": process.pid, "host": socket.gethostname(), "claimed_s": 2e9}
    (run / "owner.lock").write_text(json.dumps(owner))
    command_line(["crash", str(run)])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"Process {process.pid} on ")
    assert "vanished while it was starting" in first
    assert "No death on record: finished." in rest
    command_line(["crash", "--json", str(run)])
    assert json.loads(capsys.readouterr().out)["owner"]["pid"] == process.pid
    # The process of an earlier run, too, may have begun another one.
    (run / "owner.lock").write_text(json.dumps(owner | {"pid": os.getpid()}))
    command_line(["crash", str(run)])
    assert "is starting, and has recorded nothing yet" in capsys.readouterr().out
    (run / "owner.lock").write_text(json.dumps(owner | {"pid": os.getpid(), "claimed_s": 1e9}))
    command_line(["crash", str(run)])
    assert "starting" not in capsys.readouterr().out


LAUNCHES = """
import subprocess, sys
subprocess.run([sys.executable, "-m", "esper_lightning", *sys.argv[1:]])
"""


@pytest.mark.ddp
@pytest.mark.crash
def test_a_rank_whose_launcher_is_killed_before_the_ranks_have_met_leaves():
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}  # and nobody is at the address:
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    words = [*FIT, "--trainer.devices=2", "--trainer.strategy=ddp", "--run_dir=run"]
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHES, *words],
        env={**os.environ, **ranks},
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        for line in launcher.stderr:
            if "Initializing distributed" in line:
                break
        launcher.kill()
        said = launcher.stderr.read()  # ends when the rank does
    assert "what started this rank is gone" in said


@pytest.mark.parametrize("words", [["crash", "--json", "~/no"], ["export", "--ckpt_path=~/no"]])
def test_a_tilde_that_no_shell_expanded_is_the_home_folder(words, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("esper_lightning.cli.main._prepare", lambda w: seen.append(w) or list)
    command_line(words)
    assert seen == [[word.replace("~", str(tmp_path)) for word in words]]


def test_the_shell_completes_commands_and_configs(tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "esper_lightning", "--completion"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ask = "COMP_WORDS=(esper {}); COMP_CWORD={}; _esper; echo ${{COMPREPLY[@]}}\n"
    asked = ask.format("cr", 1) + ask.format("fit --config walk", 3)
    words = ["bash", "--norc", "-c", f"{script}\n{asked}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == ["crash", "walker2d"]


def test_an_import_that_finds_no_temporary_directory_is_one_line(monkeypatch, capsys):
    def no_import(name: str) -> None:
        raise FileNotFoundError(errno.ENOENT, f"No usable temporary directory for {name}")

    monkeypatch.setattr(importlib, "import_module", no_import)
    with pytest.raises(SystemExit) as caught:
        command_line(["doctor"])
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert "No usable temporary directory for esper_lightning.cli.doctor" in line
