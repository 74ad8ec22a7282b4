"""A job is one run of ``esper fit``: started, stopped, recognised when it is asked for again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper_lightning.cli import jobs
from esper_lightning.cli.jobs import command_of, fit_job
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.processes import identify, is_alive

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Gives a function that makes the job of a program in place of esper."""
    config = tmp_path / "config.yaml"
    config.write_text("model: {}")

    def make(program: str, *settings: str):
        monkeypatch.setattr(jobs, "_ESPER", [sys.executable, "-c", program])
        monkeypatch.setattr(jobs, "_LOOK_S", 0.01)
        return fit_job(tmp_path / "run", [str(config)], settings, 3)

    return make


def test_the_words_of_a_run(job, tmp_path):
    made = job("", "--model.ppo.clip=0.1")
    assert made.words[:2] == ["fit", "--config"]
    assert made.words[3:6] == ["--model.ppo.clip=0.1", "--model.seed", "3"]
    assert made.words[6:10] == ["--run_dir", str(tmp_path / "run"), "--ckpt_path", "last"]
    assert command_of(made).endswith(" --trainer.enable_progress_bar false")


def test_the_end_of_the_output_is_kept_and_the_whole_is_in_the_log(job):
    program = "import os; print(os.environ['OMP_NUM_THREADS'], *range(30), sep='\\n'); exit(5)"
    made = job(program)
    ended = made.execute(threads=2)
    assert (ended.status, ended.was_stopped, ended.says[-1]) == (5, False, "29")
    assert len(ended.says) == 15
    made.execute(threads=2)
    assert (made.run / "fit.log").read_text().count("29\n") == 2


def test_a_run_is_ended_when_it_is_asked_for(job):
    asked = []

    def stops():
        asked.append(True)
        return len(asked) == 3

    ended = job("import time; time.sleep(60)").execute(threads=1, stops=stops)
    assert (ended.was_stopped, ended.status) == (True, -15)
    assert len(asked) == 3


def test_a_run_of_other_settings_is_refused_once_it_has_begun(job):
    job("", "--model.ppo.clip=0.1").execute(threads=1)
    other = job("", "--model.ppo.clip=0.2")
    other.refuse_other_settings()  # the first run was refused itself, and left nothing
    RunLayout(other.run).config.touch()
    with pytest.raises(ValueError, match=r"ab.txt must be of the same settings"):
        other.refuse_other_settings()


def test_a_run_is_finished_if_its_process_says_so(job):
    made = job("")
    assert not made.is_finished
    process = RunLayout(made.run).rank(0).process
    process.parent.mkdir(parents=True)
    process.write_text(json.dumps({"state": "finished"}))
    assert made.is_finished


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process")
@pytest.mark.parametrize(
    "start", ["fit_job(Path('run'), [], [], 0).execute(threads=1)", "start_esper(['fit'])"]
)
def test_a_run_ends_with_the_process_that_started_it(tmp_path, start):
    esper = (
        "import os, pathlib, time; from esper_lightning.cli import main as command;"
        "begins = lambda words: pathlib.Path('pid').write_text(str(os.getpid()));"
        "command._prepare = lambda words: begins(words) and (lambda: time.sleep(60));"
        "command.main()"
    )
    program = (
        "import sys; from pathlib import Path; from esper_lightning.cli import jobs;"
        f"jobs._ESPER = [sys.executable, '-c', {esper!r}]; jobs.{start}"
    )
    (tmp_path / "run").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    starts = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    run = identify(int((tmp_path / "pid").read_text()))
    assert is_alive(run)
    starts.kill()
    starts.wait()
    until(lambda: not is_alive(run))


def until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
