"""What launchers learn of a death: the error, its file, and an exit status of its own."""

import json
import os
import time
from dataclasses import replace

import pytest

from esper_lightning.cli import launcher
from esper_lightning.cli.crash import run as crash
from esper_lightning.cli.launcher import tell_launchers
from esper_lightning.cli.main import main
from esper_lightning.forensics.attempts import list_attempt
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.processes import identify
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.report import CrashReport, ErrorReport
from tests.cli.test_lightning_cli import CARTPOLE, QUICK


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """The file that Kubernetes makes; that of a launcher of these tests is not for their errors."""
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setattr(launcher, "_TERMINATION_LOG", path)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    return path


@pytest.fixture
def die(tmp_path):
    """Let this process die, with a recording or without."""

    def die(error=None, *, recorded=True, **known):
        files = RunLayout(tmp_path / "run").rank(0)
        error = error or RuntimeError("injected")

        def dies():
            if recorded:
                list_attempt(files)
                process = ProcessRecord(**vars(identify(os.getpid())), started_s=time.time())
                process = replace(process, rank=0, state="failed")
                files.directory.mkdir(parents=True, exist_ok=True)
                process.write(files.process)
                described = ErrorReport(type=type(error).__name__, message=str(error))
                died = {"cause": "exception", "error": described, "iteration": 7, "exit_status": 1}
                CrashReport(**{**process.of_rank(), **died, **known}).write(files.crash)
            raise error

        with pytest.raises(BaseException) as caught:  # noqa: PT011 - SystemExit among them
            tell_launchers(dies, lambda: tmp_path / "run")
        return caught.value

    return die


def test_the_same_death_twice_has_a_status_of_its_own(die, tmp_path, capsys):
    assert isinstance(die(), RuntimeError)
    again = die()
    assert isinstance(again, SystemExit)
    assert again.code == 65
    said = capsys.readouterr().err
    assert "RuntimeError: injected" in said  # its traceback, as Python prints it
    assert "esper: 2 attempts have died in iteration 7 of the same error." in said
    report = CrashReport.read(RunLayout(tmp_path / "run").rank(0).crash)
    assert report is not None
    assert report.exit_status == 65


def test_another_error_or_iteration_is_another_death(die):
    die()
    assert isinstance(die(RuntimeError("another")), RuntimeError)
    assert isinstance(die(RuntimeError("another"), iteration=8), RuntimeError)


def test_a_signal_keeps_its_status(die):
    for _ in range(3):
        assert die(SystemExit(143), cause="signal").code == 143
    for _ in range(2):
        assert isinstance(die(KeyboardInterrupt(), cause="signal"), KeyboardInterrupt)


def test_a_death_that_is_not_on_record_is_not_compared(die):
    die()
    die()
    files_of_another_process = die(recorded=False)
    assert isinstance(files_of_another_process, SystemExit)  # this process is on record
    fresh = pytest.raises(RuntimeError, match="injected")
    with fresh:
        tell_launchers(lambda: (_ for _ in ()).throw(RuntimeError("injected")), lambda: None)


def test_kubernetes_finds_the_death_in_its_file(die, log):
    die()
    text = log.read_text()
    assert text.startswith("Rank 0 died in iteration 7: RuntimeError: injected\nAttempt 1 in ")
    assert text.rstrip().endswith("RuntimeError: injected")
    die(RuntimeError("x" * 9000))
    assert len(log.read_bytes()) <= 4096
    die(RuntimeError("closed by peer"), cause="peer")
    assert "closed by peer" not in log.read_text()


def test_without_kubernetes_there_is_no_such_file(die, log):
    log.unlink()
    die()
    assert not log.exists()


@pytest.mark.parametrize("asked", [True, False])
def test_torchrun_finds_the_death_in_its_file(die, tmp_path, monkeypatch, asked):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path) if asked else "")
    die()
    assert path.exists() == asked
    if asked:
        said = json.loads(path.read_text())["message"]
        assert "injected" in said["message"]
        assert "Traceback" in said["extraInfo"]["py_callstack"]


def test_a_run_that_dies_twice_in_the_same_iteration_ends_with_65(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["esper"])
    dies = {"class_path": "tests.crash.dies.Dies", "init_args": {"at": 2, "how": "raise"}}
    words = ["fit", "--config", CARTPOLE, *QUICK, "--trainer.callbacks", json.dumps([dies])]
    words += ["--run_dir", "run", "--ckpt_path", "last"]
    with pytest.raises(RuntimeError, match="injected"):
        main(words)
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 65
    capsys.readouterr()
    with pytest.raises(SystemExit) as asked:  # as scripts can
        crash(["run", "--attempts"])
    assert asked.value.code == 65
    text = capsys.readouterr().out
    assert "2 attempts died in iteration 2 of the same error." in text
    assert "dies.py" in text
    crash(["run"])
    assert "2 attempts, of which 2 died of the same error" in capsys.readouterr().out
