"""A dead run is played again: the same rows, bit for bit, and the right verdict."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from esper_lightning.cli.replay import STATUSES
from esper_lightning.forensics.deaths import failing_iteration
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.processes import is_alive
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.remains import Remains, examine, first_failure
from esper_lightning.forensics.replay import compared
from esper_lightning.forensics.report import CrashReport
from tests import forked

pytestmark = pytest.mark.crash
_ENV: dict[str, Any] = {"num_envs": 8}
_HERE = "tests.crash.replayed"
_LIMIT_S = 200.0
_STATE_OF_RUN = "checkpoints", "rank0", "rank1", "owner.lock", "config.yaml"


def settings(
    *,
    env: Mapping[str, Any] | None = None,
    callback: Mapping[str, Any] | None = None,
    iterations: int = 12,
    compiles: bool = False,
    recurrent: bool = False,
    ranks: int = 1,
    keeps_state: bool = False,
) -> dict[str, Any]:
    """The config of a short run that evaluates and saves after each third iteration."""
    policy = {"class_path": "esper_lightning.MLP", "init_args": {"hidden_sizes": [8]}}
    if recurrent:
        policy = {
            "class_path": "esper_lightning.Recurrent",
            "init_args": {"hidden_sizes": [8], "memory_size": 8},
        }
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": iterations}
    recorder = {"class_path": "esper_lightning.FlightRecorder"}
    recorder |= {"init_args": {"keeps_state": keeps_state, "print_profile": False}}
    trainer["callbacks"] = [recorder, *([] if callback is None else [dict(callback)])]
    if ranks > 1:
        trainer |= {"devices": ranks, "strategy": "ddp"}
    kind = f"{_HERE}.Faulty" if env else "esper_lightning.envs.CartPole"
    return {
        "model": {
            "env": {"class_path": kind, "init_args": _ENV | dict(env or {})},
            "policy": policy,
            "ppo": {"rollout_steps": 8, "minibatches": 2, "epochs": 1},
            "iterations_per_epoch": 3,
            "eval_episodes": 2,
            "compile": "auto" if compiles else "off",
        },
        "trainer": trainer,
    }


def dies(callback: str = "Dies", **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"{_HERE}.{callback}", "init_args": arguments}


def morphogenesis() -> dict[str, Any]:
    path = Path(__file__).parents[1] / "fixtures/runs/morphogenesis/config.yaml"
    found = yaml.safe_load(path.read_text())
    recorder = settings()["trainer"]["callbacks"][0]
    found["trainer"] |= {"callbacks": [recorder, dies("DiesWhileBlending")], "max_steps": 40}
    found["model"] |= {"iterations_per_epoch": 3, "eval_episodes": 2, "total_env_steps": None}
    return {name: found[name] for name in ("model", "trainer")}


def esper(words: Sequence[object], *, compiles: bool = False) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, **forked.QUIET}
    if compiles:
        variables.pop("TORCH_COMPILE_DISABLE", None)
    return forked.run(
        ["-m", "esper_lightning", *words],
        env=variables,
        cwd=forked.ROOT,
        timeout=_LIMIT_S,
        children=True,
    )


def fit(config: Mapping[str, Any], folder: Path, **how: Any) -> Path:
    """Let a run die, and return its directory."""
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    run_dir = folder / "run"
    words = ["fit", "--config", folder / "config.yaml", "--run_dir", run_dir]
    done = esper(words, **how)
    assert done.returncode not in (0, 2), done.stderr[-2000:]
    end = time.monotonic() + 20  # the report of a process that vanished comes soon after
    while not is_recorded(first_failure(examine(run_dir))):
        assert time.monotonic() < end
        time.sleep(0.02)
    return run_dir


def is_recorded(failed: Remains) -> bool:
    """Whether the second process has written its report, and then the end of the process."""
    return (failed.report or CrashReport()).complete and failed.state != "vanished"


def content_of(run_dir: Path) -> dict[Path, bytes]:
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if not path.name.startswith(".")}


def check_replay(
    run_dir: Path,
    outcome: str,
    *words: object,
    begins: int,
    ranks: int = 1,
    before: bool = True,
    **how: Any,
) -> str:
    """Replay a run; rows, files and the verdict must be right. Returns what was printed."""
    kept = content_of(run_dir)
    done = esper(["replay", run_dir, *words], **how)
    said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == STATUSES[outcome], said
    assert content_of(run_dir) == kept  # nothing is written where the evidence is
    assert outcome in done.stdout.lower(), said
    directory = run_dir.with_name("replay_of_run")
    first = first_failure(examine(run_dir))
    last = failing_iteration(first) - 1
    for rank in range(ranks):
        pairs = []
        for place in (run_dir, directory):
            path = RunLayout(place).rank(rank).history
            rows = read_json_lines(path) if path.exists() else []
            pairs.append([compared(r) for r in rows if begins < r["iteration"] <= last])
        assert pairs[0] == pairs[1]
        assert len(pairs[0]) == last - begins
    assert RunLayout(directory).before_fault.exists() == before
    if outcome == "reproduced" and first.report.cause not in ("vanished",):
        assert first_failure(examine(directory)).windows[-1].was_open, said
    return done.stdout


def replayed(config: Mapping[str, Any], folder: Path, *, begins: int, **how: Any) -> str:
    own = {name: how[name] for name in ("compiles",) if name in how}
    return check_replay(fit(config, folder, **own), "reproduced", begins=begins, **how)


@pytest.mark.slow
def test_a_nan_in_a_reward_comes_again_and_once_more_from_before_ckpt(tmp_path):
    config = settings(env={"fault": "nan", "at": 8})
    said = replayed(config, tmp_path, begins=6)
    assert "NonFiniteError" in said
    done = esper(["replay", tmp_path / "run", "--deep", "--run_dir", tmp_path / "deep"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Replay from the state after iteration 7, 1 iteration," in done.stdout
    crash = esper(["crash", tmp_path / "run"]).stdout
    assert crash.splitlines()[-1].strip() == f"esper replay {tmp_path / 'run'}"
    crash = esper(["crash", tmp_path / "replay_of_run"]).stdout
    assert "Reproduced: iteration 8" in crash


def test_a_kill_by_the_program_is_one_iteration_away(tmp_path):
    config = settings(env={"fault": "kill", "at": 5}, keeps_state=True)
    said = replayed(config, tmp_path, begins=4)
    assert "vanished" in said


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 6, 7])  # in the middle, at the end and the start of an epoch
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_after_its_last_iteration(tmp_path, ranks, at):
    how = {"keeps_state": True, "ranks": ranks}
    fault = dies(at=at, fault="kill", on_rank=ranks - 1)
    run_dir = fit(settings(callback=fault, **how), tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(**how)))
    words = ["fit", "--config", tmp_path / "config.yaml", "--ckpt_path", "last"]
    again = esper([*words, "--run_dir", run_dir])
    assert again.returncode == 0, again.stderr[-3000:]
    said = f"Resuming after iteration {at - 1}, the latest one stored." in again.stdout
    assert said == ((at - 1) % 3 > 0)  # or else last.ckpt is as good
    whole = esper([*words, "--run_dir", tmp_path / "whole"])
    assert whole.returncode == 0, whole.stderr[-3000:]
    for rank in range(ranks):
        rows = [
            [compared(row) for row in read_json_lines(RunLayout(place).rank(rank).history)]
            for place in (run_dir, tmp_path / "whole")
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 12


@pytest.mark.slow
def test_a_kill_from_outside_does_not_happen_again(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(iterations=100_000)))
    run_dir = tmp_path / "run"
    words = ["fit", "--config", tmp_path / "config.yaml", "--run_dir", run_dir]
    with (tmp_path / "output").open("wb") as output:
        process = forked.start(["-m", "esper_lightning", *words], output=output)
        history, end = RunLayout(run_dir).rank(0).history, time.monotonic() + 60
        while not history.exists() or len(history.read_bytes().splitlines()) < 5:
            assert time.monotonic() < end, (tmp_path / "output").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
    while not RunLayout(run_dir).rank(0).crash.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    failed = failing_iteration(first_failure(examine(run_dir)))
    done = esper(["replay", run_dir])
    assert done.returncode == STATUSES["did not happen again"], done.stdout + done.stderr[-2000:]
    assert f"Did not happen again: iteration {failed} went well." in done.stdout


CASES = {
    "an exception of an environment": (settings(env={"fault": "raise", "at": 8}), 6, {}),
    "an environment in a certain state": (settings(env={"fault": "state", "at": 5}), None, {}),
    "a callback": (settings(callback=dies(at=7)), 6, {}),
    "a callback at the end of an epoch": (settings(callback=dies(at=6)), 3, {}),
    "before the first checkpoint": (settings(callback=dies(at=2)), 0, {}),
    "the first iteration": (settings(env={"fault": "raise", "at": 1}), 0, {"before": False}),
    "a fault in C": (settings(env={"fault": "native", "at": 5}), 3, {}),
    "rank 1 of 2": (settings(callback=dies(at=5, on_rank=1), ranks=2), 3, {"ranks": 2}),
    "a kill of rank 1": (
        settings(callback=dies(at=5, fault="kill", on_rank=1), ranks=2),
        *(3, {"ranks": 2}),
    ),
    "both ranks": (settings(callback=dies(at=5, on_rank=-1), ranks=2), 3, {"ranks": 2}),
    "an interrupt by itself": (settings(callback=dies(at=5, fault="interrupt")), 3, {}),
    "compiled": (settings(callback=dies(at=5), compiles=True), 3, {"compiles": True}),
    "compiled, with a memory": (
        settings(callback=dies(at=5), compiles=True, recurrent=True),
        *(3, {"compiles": True}),
    ),
    "with a memory": (settings(env={"fault": "nan", "at": 5}, recurrent=True), 3, {}),
    "morphogenesis while blending": (morphogenesis(), None, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_is_reproduced(name, tmp_path):
    config, begins, how = CASES[name]
    if begins is None:
        run_dir = fit(config, tmp_path)
        failing = failing_iteration(first_failure(examine(run_dir)))
        check_replay(run_dir, "reproduced", begins=3 * ((failing - 1) // 3), **how)
    else:
        replayed(config, tmp_path, begins=begins, **how)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        (signal.SIGINT, True),
        (signal.SIGINT, False),
        (signal.SIGTERM, False),
        (signal.SIGKILL, False),
    ],
)
def test_a_replay_that_is_stopped_leaves_a_verdict_and_nothing_else(
    tmp_path, monkeypatch, number, whole_group
):
    run_dir = fit(settings(callback=dies("DiesSlowly", at=40), iterations=41), tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    words = [sys.executable, "-m", "esper_lightning", "replay", "--from_start", str(run_dir)]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=output, cwd=forked.ROOT, start_new_session=True
        )
    rank, end = RunLayout(tmp_path / "replay_of_run").rank(0), time.monotonic() + _LIMIT_S
    while not rank.history.exists():
        assert time.monotonic() < end, (tmp_path / "output").read_text()
        time.sleep(0.05)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    status = process.wait(60)
    if number == signal.SIGKILL:  # the kernel tells the process of the replay
        while ProcessRecord.load(rank.process).state == "running":
            assert time.monotonic() < end
            time.sleep(0.05)
    else:
        assert status == STATUSES["undecided"], (tmp_path / "output").read_text()
        said = (tmp_path / "output").read_text()
        assert f"({number.name}), before iteration 40 was over." in said
        assert not list((tmp_path / "temporary").glob("*replay-*"))
    record = ProcessRecord.load(rank.process)
    assert record.state == "failed"
    while is_alive(record):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_what_differs_is_named(tmp_path):
    run_dir = fit(settings(callback=dies(at=5)), tmp_path)
    config = RunLayout(run_dir).config
    changed = yaml.safe_load(config.read_text())
    changed["model"]["ppo"]["learning_rate"] = 0.01
    config.write_text(yaml.safe_dump(changed))
    done = esper(["replay", run_dir])
    assert done.returncode == STATUSES["different"], done.stdout + done.stderr[-2000:]
    assert "Different from iteration 4 on: loss/" in done.stdout
    assert "Different from iteration 4 on" in done.stderr  # as soon as the row was there


@pytest.mark.parametrize("what", ["nothing", "a run that lives well", "no config"])
def test_what_cannot_be_replayed_is_one_line(what, tmp_path):
    run_dir = Path(__file__).parents[1] / "fixtures/runs" / "cartpole"
    if what == "nothing":
        run_dir = tmp_path
    elif what == "no config":
        run_dir = run_dir.with_name("died_of_nan")
    done = esper(["replay", run_dir])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
