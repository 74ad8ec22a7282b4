"""The check of a GPU is rehearsed on a CPU: every step runs, and its results are on disk."""

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.gpu_proof.simulated import SimulatedCuda

ROOT = Path(__file__).parents[2]
ONE_TEST = "tests/training/test_cuda.py::test_nothing_synchronises_before_the_one_copy"
TESTS = """
import os, subprocess, time
import pytest

pytestmark = pytest.mark.gpu

def test_good():
    pass

def test_bad():
    assert 1 == 2

def test_hangs():
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(os.environ["PIDS"] + "_", "w") as file:
        print(os.getpid(), child.pid, file=file)
    os.rename(os.environ["PIDS"] + "_", os.environ["PIDS"])
    time.sleep(600)
"""


SET_PDEATHSIG = 1  # of Linux's prctl
# A step that is started by a program of its own, and leaves a process behind in another session.
PARENT = """
import importlib.util, sys, threading
spec = importlib.util.spec_from_file_location("gpu_check", "scripts/gpu_check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)
check.__file__ = sys.argv[1]
def tell(found):
    print(found, flush=True)
check.run_apart("about", check.MACHINES["cpu"], 100.0, tell, threading.Event())
"""
# The check without its steps: each has a result at once.
WITHOUT_STEPS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gpu_check", "scripts/gpu_check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)
check.run_apart = lambda name, machine, limit_s, tell, stop: tell({"of": name})
sys.exit(check.main(["--device", "cpu", "--out", sys.argv[1]]))
"""
STEP = """
import subprocess, time
subprocess.run(["sh", "-c", "setsid sleep 600 & setsid sleep 600 &"])
print('RESULT {"left": 2}', flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def command(*options):
    return ["scripts/gpu_check.sh", "--device", "cpu", *map(str, options)]


def variables(folder, **more):
    return {"OUT": str(folder), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin", **more}


def rehearse(folder, *options, **more):
    """The ended process of a rehearsal, and its results."""
    env = variables(folder, **more)
    run = subprocess.run(
        command(*options), cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        preexec_fn=end_with_the_tests,
    )  # fmt: skip
    return run, json.loads((folder / "gpu_check.json").read_text())


def end_with_the_tests():
    """Have this process get SIGTERM when its parent dies, and SIGTERM is what it understands."""
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGTERM)


def test_every_step_runs_and_is_in_the_table(check, tmp_path):
    options = ("--patience", 5, "--tests", f"{ONE_TEST}[off-discrete]")
    fast = {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    run, results = rehearse(tmp_path, *options, **fast)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "failed: nothing"
    assert set(results) == set(check.steps_of(check.MACHINES["cpu"]))
    assert not any("error" in found or "log" in found for found in results.values())
    speed = results["speed 8 x 4"]
    assert all(speed[mode]["steps_per_s"] > 0 for mode in check.MODES)
    assert set(speed["max"]["stages_ms"]) == {"rollout", "advantages", "update"}
    assert max(results["equal"]["max"]) == 0.0  # without compilers
    assert all(value for name, value in results["faults"].items() if name != "took_s")
    assert results["tests"]["counts"] == {"passed": 1}
    host = results["host"]
    assert all(host[name]["iteration"] > host[name]["between"] > 0 for name in host["host_share"])
    assert host["busy"] > 0
    assert results["evaluation"]["difference"] == 0.0
    assert results["signals"]["inherited"] == results["signals"]["at the start"] == "default"
    assert results["golden"]["a second run of cartpole is equal"]
    (histories,) = tmp_path.glob("golden-cpu-torch-*.json")
    assert json.loads(histories.read_text())["histories"].keys() == {"cartpole"}
    died = results["out of memory"]
    assert (died["died_of"], died["report"], died["rows"]) == ("OutOfMemoryError", True, 2)
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| max | " in text
    assert "8 x 4, max: " in text
    assert "Steps that failed: none." in text
    assert all(f"| {name} | `" in text for name in results if name[:5] not in ("speed", "jax"))
    assert text in (tmp_path / "log.txt").read_text()


def test_where_every_step_fails_all_run_and_the_status_says_so(check, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    run, results = rehearse(tmp_path, PYTHON=str(tmp_path / "empty" / "bin" / "python"))
    assert run.returncode == 1
    names = set(check.steps_of(check.MACHINES["cpu"]))
    assert set(results) == names
    assert results["jax"].keys() == {"not installed", "took_s"}
    failed = run.stdout.splitlines()[-1].removeprefix("failed: ").split(", ", 2)
    assert failed[:2] == ["about", "speed 8 x 4"]
    assert {n for n, found in results.items() if "error" in found} == names - {"jax"}
    assert "No module named 'torch'" in results["speed 8 x 4"]["error"]
    assert "No module named pytest" in results["tests"]["error"]
    text = (tmp_path / "gpu_check.md").read_text()
    assert "`ModuleNotFoundError: No module named 'torch'` |" in text
    assert "Steps that failed: about, speed 8 x 4, " in text


def apart(check, name, machine, limit_s):
    found = {}
    check.run_apart(name, machine, limit_s, found.update, threading.Event())
    return found


def test_a_step_that_fails_or_hangs_keeps_what_it_had_found(check, tmp_path, monkeypatch):
    program, cpu = tmp_path / "step.py", check.MACHINES["cpu"]
    monkeypatch.setattr(check, "__file__", str(program))
    first = "import sys, time; print('RESULT {\"first\": 1}', flush=True); "
    program.write_text(first + "sys.exit('broken')")
    assert apart(check, "about", cpu, 20.0) == {"first": 1, "status": 1, "error": "broken"}
    program.write_text(first + "time.sleep(60)")
    assert apart(check, "about", cpu, 2.0) == {"first": 1, "error": "no end within 2 s"}


def test_tests_that_take_longer_than_their_limit_leave_counts(check, tmp_path, monkeypatch):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    (tmp_path / "test_some.py").write_text(TESTS)
    names = [f"{tmp_path}/test_some.py::test_{name}" for name in ("good", "bad", "hangs")]
    machine = check.MACHINES["cpu"]._replace(tests=names)
    found, late_s = {}, []

    def tell(one):
        found.update(one)
        if len(found.get("counts", ())) == 2:
            late_s[:] = [1000.0]

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(late_s))
    monkeypatch.setattr(check, "time", clock)
    check.run_apart("tests", machine, 200.0, tell, threading.Event())
    assert found["counts"] == {"passed": 1, "failed": 1}
    assert [name.rpartition("::")[2] for name in found["failed"]] == ["test_bad"]
    assert found["error"] == "no end within 200 s"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_running_steps_with_all_that_they_started(tmp_path, number):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "gpu_check.json").write_text("earlier")
    options = ("--only", "tests", "growth", "--tests", tmp_path / "test_some.py")
    env = variables(tmp_path, PIDS=str(tmp_path / "pids"))
    with subprocess.Popen(
        command(*options), cwd=ROOT, env=env, stdout=subprocess.PIPE, start_new_session=True,
        preexec_fn=end_with_the_tests,  # noqa: PLW1509
    ) as process:  # fmt: skip
        found, end = {}, time.monotonic() + 100
        while len(found.get("counts", ())) < 2 or not (tmp_path / "pids").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
            with contextlib.suppress(FileNotFoundError, ValueError):
                found = json.loads((tmp_path / "gpu_check.json").read_text())["tests"]
        os.killpg(process.pid, number)  # as ``timeout`` and a terminal do
        lines = process.stdout.read().decode().splitlines()
    assert process.returncode == 128 + number
    assert lines[-1] == "failed: tests"
    assert "Steps that have not ended: growth, growth, compiled." in lines
    assert (tmp_path / "log.txt").read_text().splitlines() == lines
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert results.keys() == {"tests"}  # nothing is begun after the signal
    assert results["tests"]["counts"] == {"passed": 1, "failed": 1}
    assert results["tests"]["error"] == "ended by a signal"
    assert len((tmp_path / "pids").read_text().split()) == 2
    nothing_is_left(tmp_path)
    (earlier,) = tmp_path.glob("gpu_check-*.json")
    assert earlier.read_text() == "earlier"


def nothing_is_left(folder):
    """No process is left, soon, that has a variable or an argument with the folder."""
    end = time.monotonic() + 10  # a killed process ends once it is scheduled
    while left := [pid for pid in Path("/proc").glob("[0-9]*") if str(folder) in words_of(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def words_of(process):
    with contextlib.suppress(OSError):
        return "".join((process / n).read_text("utf-8", "replace") for n in ("environ", "cmdline"))
    return ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_step_ends_with_its_parent_and_with_all_that_it_has_started(tmp_path, number):
    """However the parent dies, and even what left its session and its family."""
    (tmp_path / "step.py").write_text(STEP)
    words = [sys.executable, "-c", PARENT, str(tmp_path / "step.py")]
    env = {"PATH": "/usr/bin:/bin", "FOLDER": str(tmp_path)}
    with subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if b"left" in line:
                break
        process.send_signal(number)
    assert process.returncode == -number
    nothing_is_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1, 0.3, 0.7])
def test_a_signal_to_the_script_leaves_no_process_at_any_moment(tmp_path, number, after_s):
    env = variables(tmp_path)
    process = subprocess.Popen(
        command("--only", "about", "growth"), cwd=ROOT, env=env, stdout=subprocess.DEVNULL
    )
    time.sleep(after_s)
    process.send_signal(number)
    process.wait(20)
    nothing_is_left(tmp_path)


@pytest.mark.slow
def test_without_xdist_files_of_tests_run_side_by_side(check, tmp_path, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    texts = {"good": "def test(): pass", "none": "x = 1", "bad": "def test(): assert 1 == 2"}
    for name, text in texts.items():
        marked = f"import pytest\npytestmark = pytest.mark.gpu\n{text}\n"
        (tmp_path / f"test_{name}.py").write_text(marked)
    paths = [str(path) for path in tmp_path.iterdir()]
    found = {}
    for one in check.tests(check.MACHINES["cpu"]._replace(tests=paths)):
        found.update(one)
    assert found["counts"] == {"passed": 1, "failed": 1}
    assert "assert 1 == 2" in found["error"]


def test_a_graph_of_an_evaluation_is_the_evaluation(check, monkeypatch):
    cuda = SimulatedCuda()
    cuda.install(monkeypatch)
    *_, last = check.evaluation(check.MACHINES["cpu"])
    assert last == {"difference": 0.0}
    assert len(cuda.graphs) == 1


def test_no_fault_of_the_table_or_of_a_step_costs_the_others(check, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(check, "run_apart", fails)
    monkeypatch.setattr(check, "table", fails)
    for name in ("signal", "alarm"):
        monkeypatch.setattr(check.signal, name, lambda *_: None)
    options = ["--device", "cpu", "--out", str(tmp_path), "--only", "about", "growth"]
    assert check.main(options) == 1
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert results.keys() == {"about", "growth", "growth, compiled"}
    assert all(found["error"] == "OSError: no more processes" for found in results.values())
    text = (tmp_path / "gpu_check.md").read_text()
    assert text == "There is no table: OSError: no more processes\n"


def run_without_steps(folder, output):
    """Status and standard error of a check of all steps, without their work."""
    words = [sys.executable, "-c", WITHOUT_STEPS, str(folder)]
    env = {"PATH": "/usr/bin:/bin"}  # and so the output is buffered
    run = subprocess.run(
        words, cwd=ROOT, env=env, stdout=output, stderr=subprocess.PIPE, text=True, check=False
    )
    return run.returncode, run.stderr


def test_where_nobody_reads_the_output_every_step_runs_and_the_log_has_it_all(check, tmp_path):
    reads, writes = os.pipe()
    os.close(reads)
    assert run_without_steps(tmp_path, writes) == (0, "")
    os.close(writes)
    names = set(check.steps_of(check.MACHINES["cpu"]))
    assert json.loads((tmp_path / "gpu_check.json").read_text()).keys() == names
    log = (tmp_path / "log.txt").read_text()
    assert all(f'{name} `{{"of": "{name}"' in log for name in names)
    assert (tmp_path / "gpu_check.md").read_text() in log
    assert log.splitlines()[-1] == "failed: nothing"


def test_on_a_full_disk_every_step_runs_and_the_output_has_it_all(check, tmp_path):
    for name in ("log.txt", "gpu_check.json.new", "gpu_check.md.new"):
        (tmp_path / name).symlink_to("/dev/full")
    with (tmp_path / "output").open("w") as output:
        assert run_without_steps(tmp_path, output) == (0, "")
    text = (tmp_path / "output").read_text()
    names = set(check.steps_of(check.MACHINES["cpu"]))
    assert all(f'{name} `{{"of": "{name}"' in text for name in names)
    assert text.endswith("failed: nothing\n")


def test_results_of_earlier_runs_are_renamed_once(check, tmp_path):
    names = ["gpu_check.json", "gpu_check.md", "golden-cuda-torch-2.11.0.json", "golden-notes.txt"]
    for name in names:
        (tmp_path / name).write_text(name)
    check.set_aside(tmp_path)
    check.set_aside(tmp_path)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(found.values()) == sorted(names)
    assert not found.keys() & set(names[:3])
    assert "golden-notes.txt" in found
    assert all(re.sub(r"-\d{15,}", "", name) == text for name, text in found.items())


def test_a_long_result_is_cut_between_values_and_an_error_keeps_its_last_lines(check):
    traced = "".join(f'  File "some.py", line {n}, in f\n    f()\n    ^^^\n' for n in range(300))
    error = f"Traceback (most recent call last):\n{traced}ValueError: a | b\n"
    text = check._result({"error": error, "values": list(range(1000))})
    shown, *lines = text.split("<br>")
    assert shown.endswith(", ...`")
    assert len(shown) < 1510
    assert lines[-1] == "`ValueError: a \\| b`"
    assert all(line in ("`f()`", lines[-1]) or line.startswith('`File "some.py"') for line in lines)
    assert sum(map(len, lines)) < 1000
    assert check.last_lines("x" * 50, 10) == "x" * 10
    assert check.last_lines("first\nsecond\nthird\n", 12) == "second\nthird"
    assert check.last_lines("", 12) == ""


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    run, results = rehearse(tmp_path, "--patience", 3, "--seconds", 450)
    assert run.returncode == 0, run.stdout + run.stderr
    assert not any("error" in found for found in results.values()), run.stdout
    assert results["jax"].get("platform", "not installed" in results["jax"]) in ("cpu", True)
    assert results["tests"]["counts"]["passed"] > 20
    assert (tmp_path / "gpu_check.md").read_text() in (tmp_path / "log.txt").read_text()
