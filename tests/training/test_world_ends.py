"""Worker processes of simulators end with the run, however the run ends, and runs are resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper_lightning.forensics.files import read_json_lines
from tests import forked

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAM = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch import Callback
from esper_lightning.envs import Gymnasium
from esper_lightning.envs.adapters import workers
from tests.training.test_worlds import fit

ending, pids = sys.argv[1:]
if ending == "pipe":
    workers._PR_SET_PDEATHSIG = 0  # no signal at the parent's death: only the pipe ends

class Ends(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        Path(pids).write_text(" ".join(str(p.pid) for p in pl_module._learner._env._env._processes))
        if ending == "exception":
            raise RuntimeError("boom")
        if ending in ("SIGTERM", "SIGKILL", "pipe"):
            os.kill(os.getpid(), getattr(signal, ending, signal.SIGKILL))

fit(Gymnasium(id="CartPole-v1", num_envs=4, workers=2), Ends(), iterations=2, eval_episodes=4)
"""


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def none_of(pids: list[int]) -> bool:
    """Whether all processes end within some seconds."""
    end = time.monotonic() + 10
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(lives, pids))


@pytest.mark.crash
@pytest.mark.parametrize(("ending", "status"), [
    ("normal", 0), ("exception", 1), ("SIGTERM", None), ("SIGKILL", -9), ("pipe", -9),
])  # fmt: skip
@pytest.mark.trap(4)
def test_no_worker_outlives_a_run(ending, status, tmp_path):
    program, pids = tmp_path / "program.py", tmp_path / "pids"
    program.write_text(PROGRAM)
    done = forked.run([program, ending, str(pids)], cwd=ROOT)
    if status is not None:
        assert done.returncode == status, done.stderr[-2000:]
    workers = [int(word) for word in pids.read_text().split()]
    assert len(workers) == 2
    assert none_of(workers)


def of_run(directory: Path) -> list[int]:
    """Processes whose command line names a run directory: ranks, and workers forked from them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            named = str(directory).encode() in path.read_bytes()
        except OSError:
            continue
        if named and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_are_killed_and_resumed_with_new_episodes(tmp_path):
    directory = tmp_path / "run"

    def start(**settings):
        given = {"directory": str(directory), "devices": 2, "env": "gymnasium", "budget": 768}
        words = [sys.executable, HERE / "ranks.py", json.dumps({**given, **settings})]
        env = {**os.environ, **forked.QUIET, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)

    process = start(dies_in=4, fault="SIGKILL", rank=0)
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    assert none_of(of_run(directory))
    process = start(resumes=True)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-3000:]
    for rank in (0, 1):
        said = f"The checkpoint holds no environments of rank {rank}: new episodes begin there."
        assert stderr.count(said) == 1
        rows = read_json_lines(directory / f"rank{rank}" / "history.jsonl")
        assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row.get("resumed_with_new_episodes") for row in rows].count(1) == 1
    assert none_of(of_run(directory))
