"""The check of a GPU is rehearsed on a CPU: every step runs, and its results are on disk."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_every_step_runs_and_is_in_the_table(check, tmp_path):
    left_out = ("tests", "jax")  # they take seconds, and are in the whole rehearsal
    results = check.main(["--device", "cpu", "--here", "--skip", *left_out, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "gpu_check.json").read_text()) == json.loads(json.dumps(results))
    steps = check.steps_of(check.MACHINES["cpu"])
    assert list(results) == [name for name in steps if name not in left_out]
    assert not any("error" in found or "log" in found for found in results.values())
    speed = results["speed 8 x 4"]
    assert all(speed[mode]["steps_per_s"] > 0 for mode in check.MODES)
    assert set(speed["max"]["stages_ms"]) == {"rollout", "advantages", "update"}
    assert max(results["equal"]["max"]) == 0.0  # without compilers
    assert all(value for name, value in results["faults"].items() if name != "took_s")
    died = results["out of memory"]
    assert (died["died_of"], died["report"], died["rows"]) == ("OutOfMemoryError", True, 2)
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| max | " in text
    assert "8 x 4, max: " in text
    assert all(f"| {name} | `" in text for name in results if not name.startswith("speed"))


def test_a_step_that_fails_or_hangs_keeps_what_it_had_found(check, tmp_path, monkeypatch):
    program, cpu = tmp_path / "step.py", check.MACHINES["cpu"]
    monkeypatch.setattr(check, "__file__", str(program))
    first = "import sys, time; print('RESULT {\"first\": 1}', flush=True); "
    program.write_text(first + "sys.exit('broken')")
    assert check.run_apart("about", cpu, 20.0) == {"first": 1, "status": 1, "error": "broken\n"}
    program.write_text(first + "time.sleep(60)")
    assert check.run_apart("about", cpu, 2.0) == {"first": 1, "error": "no end within 2 s"}


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    command = ["scripts/gpu_check.sh", "--device", "cpu", "--patience", "3", "--seconds", "450"]
    env = {"OUT": str(tmp_path), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not any("error" in found for found in results.values()), run.stdout
    assert results["jax"].get("platform", "absent" in results["jax"]) in ("cpu", True)
    assert "skipped" in results["tests"]["lines"][-1]
    assert (tmp_path / "gpu_check.md").read_text() in (tmp_path / "log.txt").read_text()
