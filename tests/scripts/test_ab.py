"""The launcher of variants x seeds starts, skips and resumes runs, and survives failures."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper_lightning.cli import jobs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "ab.py"
CARTPOLE = ROOT / "configs" / "cartpole.yaml"
QUIET = "--trainer.enable_progress_bar false"
# In place of esper: prints its arguments, and leaves the files that the launcher reads.
STAND_IN = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
if words[0] == "compare":
    print("compared", *words[1:])
    sys.exit()
if "7" in words:
    sys.exit("clip must be less")
run = Path(words[words.index("--run_dir") + 1])
(run / "rank0").mkdir(parents=True, exist_ok=True)
(run / "checkpoints").mkdir(exist_ok=True)
(run / "checkpoints" / "last.ckpt").touch()
(run / "config.yaml").touch()
state = "running" if "killed" in words else "finished"
(run / "rank0" / "process.json").write_text(json.dumps({"state": state}))
(run / "asked").write_text(json.dumps(words))
sys.exit(state == "running")
"""


@pytest.fixture
def ab(tmp_path, monkeypatch, capfd):
    spec = importlib.util.spec_from_file_location("ab", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ab", module)
    spec.loader.exec_module(module)
    (tmp_path / "esper.py").write_text(STAND_IN)
    monkeypatch.setattr(jobs, "_ESPER", [sys.executable, str(tmp_path / "esper.py")])
    monkeypatch.chdir(tmp_path)

    def launch(*arguments: str) -> tuple[object, str]:
        given = ["ab.py", "--config", str(CARTPOLE), "--output", "out", *arguments]
        monkeypatch.setattr("sys.argv", given)
        status: object = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code
        return status, capfd.readouterr().out

    return launch


def asked(run: str) -> list[str]:
    return json.loads((Path("out") / run / "asked").read_text())


def test_every_variant_is_trained_with_every_seed(ab):
    variants = ("--variant", "base", "--variant", "fast: --model.ppo.learning_rate 3e-3")
    status, out = ab("--seeds", "0", "1", *variants, "--", "--model.compile", "max")
    assert status == 0
    order = "out/base/seed0 out/base/seed1 out/fast/seed0 out/fast/seed1"
    assert f"compared {order} --output out" in out
    words = asked("fast/seed1")
    assert words[:3] == ["fit", "--config", str(CARTPOLE)]
    settings = ["--model.compile", "max", "--model.ppo.learning_rate", "3e-3", "--model.seed", "1"]
    assert words[3:9] == settings
    assert "--model.ppo.learning_rate" not in asked("base/seed1")


def test_a_failed_run_stops_no_other(ab):
    variants = ("--variant", "bad: --model.ppo.clip 7", "--variant", "base")
    status, out = ab("--seeds", "0", "1", *variants)
    assert status == 1
    assert out.count("FAILED with exit status 1") == 2
    assert "    clip must be less" in out
    assert "compared out/base/seed0 out/base/seed1 --output" in out  # what never began is no run
    status, out = ab("--seeds", "0", "1", "--variant", "bad: --model.ppo.clip 0.3")
    assert (status, asked("bad/seed0")[3:5]) == (0, ["--model.ppo.clip", "0.3"])


def test_what_is_finished_is_left_out_and_what_is_not_goes_on(ab):
    variants = ("--variant", "base", "--variant", "cut: killed")
    assert ab("--seeds", "0", *variants)[0] == 1
    before = Path("out/base/seed0/asked").stat().st_mtime_ns
    status, out = ab("--seeds", "0", *variants, "--dry-run")
    assert (status, len(out.splitlines())) == (0, 1)
    assert out.rstrip().endswith("--run_dir out/cut/seed0 --ckpt_path last " + QUIET)
    _, out = ab("--seeds", "0", *variants)
    assert "out/base/seed0: finished before" in out
    assert Path("out/base/seed0/asked").stat().st_mtime_ns == before
    assert asked("cut/seed0")[-4:-2] == ["--ckpt_path", "last"]


def test_runs_of_other_settings_are_not_mixed(ab):
    ab("--seeds", "0", "--variant", "base")
    status, out = ab("--seeds", "0", "1", "--variant", "base", "--", "--model.compile", "max")
    assert "ab.txt must be of the same settings" in str(status)
    assert out == ""
    assert not Path("out/base/seed1").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--variant", "a/b"),
        ("--variant", ": --model.compile max"),
        ("--variant", "base", "--variant", "base"),
        ("--variant", "base", "--jobs", "0"),
    ],
)
def test_what_cannot_work_is_refused(ab, arguments):
    assert ab(*arguments) == (2, "")


@pytest.mark.slow
def test_two_variants_from_one_command(tmp_path):
    command = [sys.executable, SCRIPT, "--config", CARTPOLE, "--seeds", "0", "1", "--output", "out"]
    command += ["--variant", "base", "--variant", "fast: --model.ppo.learning_rate 3e-3"]
    command += ["--variant", "bad: --model.ppo.clip 7", "--", "--model.total_env_steps", "4096"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "esper: error: PPOConfig.clip must lie in (0, 1), got 7.0." in done.stdout
    assert "At 4,096 env steps (the end), seeds 0 1" in done.stdout
    assert "ppo.learning_rate=0.003" in (tmp_path / "out" / "comparison.md").read_text()
