"""Files of version 0.1 are readable: that version wrote ``fixtures/runs``."""

import json
import shutil
from pathlib import Path

import pytest

from esper_lightning.cli.main import main
from esper_lightning.forensics.files import read_json_lines

RUNS = Path(__file__).parent / "fixtures" / "runs"
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is called with Trainer configured with multiple",
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(RUNS / name, tmp_path / name))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["esper"])
    return copy


@pytest.mark.parametrize("name", ["cartpole", "pendulum_gru", "morphogenesis"])
def test_a_run_is_resumed(run, name):
    directory = run(name)
    before = read_json_lines(directory / "rank0" / "history.jsonl")
    last = before[-1]
    steps = last["env_steps"] // last["iteration"]
    words = ["fit", "--config", str(directory / "config.yaml"), "--run_dir", str(directory)]
    words += ["--model.total_env_steps", str(last["env_steps"] + 2 * steps)]
    main([*words, "--ckpt_path", "last", *QUIET])
    after = read_json_lines(directory / "rank0" / "history.jsonl")
    assert after[: len(before)] == before
    assert [row["iteration"] for row in after[len(before) :]] == [
        last["iteration"] + 1,
        last["iteration"] + 2,
    ]
    assert not any("resumed_with_new_episodes" in row for row in after)


@pytest.mark.parametrize("name", ["cartpole", "pendulum_gru"])
def test_a_policy_is_evaluated_and_exported(run, name, capsys):
    checkpoint = run(name) / "checkpoints" / "last.ckpt"
    main(["evaluate", "--ckpt_path", str(checkpoint), "--trainer.accelerator", "cpu"])
    assert "mean return" in capsys.readouterr().out
    main(["export", "--ckpt_path", str(checkpoint), "--output", "policy.pt2"])
    assert Path("policy.pt2").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("died_of_nan", "Not finite, in rollout: reward, environments [1]"),
        ("killed", "The process vanished: SIGKILL by somebody, os._exit or a power failure"),
        ("terminated", "signal SIGTERM, exit status 143"),
    ],
)
def test_a_death_is_told(run, name, said, capsys):
    directory = run(name)
    main(["crash", str(directory)])
    text = capsys.readouterr().out
    assert said in text
    assert "Iteration 6, in:" in text
    main(["crash", "--json", str(directory)])
    assert json.loads(capsys.readouterr().out)["ranks"][0]["report"]["iteration"] == 6


def test_a_run_is_reported(run, capsys):
    directory = run("cartpole")
    main(["report", str(directory)])
    assert "CartPole" in capsys.readouterr().out
