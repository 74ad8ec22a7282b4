"""``torchrun --max-restarts``: every death is gone on from, or told to be the same again."""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from esper_lightning.forensics.attempts import read_attempts, same_deaths
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.processes import is_alive
from esper_lightning.forensics.rank_record import ProcessRecord
from tests import forked

pytestmark = [pytest.mark.crash, pytest.mark.ddp, pytest.mark.slow]
CARTPOLE = Path(__file__).parents[2] / "configs" / "cartpole.yaml"
ITERATIONS = 40
TIMES = ("time_s", "env_steps_per_s")
_LIMIT_S = 240.0


def launch(
    directory: Path,
    *words: str,
    fault: dict[str, object] | None = None,
    restarts: int = 3,
    keeps_state: bool = False,
    limit_s: float = _LIMIT_S,
) -> "subprocess.CompletedProcess[str]":
    """Train with two ranks under ``torchrun``, which starts them again if need be."""
    callbacks = []
    if fault is not None:
        callbacks = [{"class_path": "tests.crash.dies.Dies", "init_args": fault}]
    if keeps_state:
        recorder = {"keeps_state": True, "print_profile": False}
        callbacks.append({"class_path": "esper_lightning.FlightRecorder", "init_args": recorder})
    settings = {
        "model.env.num_envs": 16,
        "model.ppo.epochs": 2,
        "model.ppo.minibatches": 2,
        "model.iterations_per_epoch": 10,
        "model.total_env_steps": ITERATIONS * 2 * 16 * 32,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
        "trainer.strategy": "ddp",
        "trainer.devices": 2,
        "trainer.callbacks": json.dumps(callbacks),
        "run_dir": directory,
        "ckpt_path": "last",
    }
    named = [f"--{name}={value}" for name, value in settings.items()]
    run = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--max-restarts={restarts}",
        *words,
    ]
    fit = ["-m", "esper_lightning.cli.main", "fit", f"--config={CARTPOLE}", *named]
    env = {**os.environ, **forked.QUIET, "TORCH_COMPILE_DISABLE": "1"}
    env["PYTHONPATH"] = str(forked.ROOT)
    return forked.run([*run, *fit], timeout=limit_s, env=env, cwd=directory.parent, children=True)


def histories(directory: Path) -> list[list[dict[str, object]]]:
    return [
        [
            {name: value for name, value in row.items() if name not in TIMES}
            for row in read_json_lines(directory / f"rank{rank}" / "history.jsonl")
        ]
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[list[dict[str, object]]]:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(directory, "--standalone")
    assert done.returncode == 0, done.stderr
    found = histories(directory)
    assert [len(rows) for rows in found] == [ITERATIONS, ITERATIONS]
    return found


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"at": 25, "how": "kill", "rank": 1}, "vanished"),
        ({"at": 25, "how": "kill", "rank": 0}, "vanished"),
        ({"at": 25, "how": "raise", "rank": 1}, "exception"),
        ({"at": 5, "how": "raise", "rank": 1}, "exception"),  # before the first checkpoint
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_after_one_death_the_history_is_that_of_a_run_without(tmp_path, undisturbed, fault, cause):
    run = tmp_path / "run"
    once = str(tmp_path / "once")
    done = launch(run, "--standalone", fault={**fault, "once": once})
    assert done.returncode == 0, done.stderr
    assert histories(run) == undisturbed
    attempts = read_attempts([run])
    assert [each.state for each in attempts] == ["failed", "finished"]
    assert (attempts[0].cause, attempts[0].rank) == (cause, fault["rank"])
    assert attempts[0].iteration == fault["at"]


class Killer(threading.Thread):
    """Kills one of the ranks at random moments.

    Args:
        directory: Run directory.
        kills: Number of kills, after which the run is left to finish.
    """

    def __init__(self, directory: Path, kills: int) -> None:
        super().__init__(daemon=True)
        self._files = [RunLayout(directory).rank(rank).process for rank in (0, 1)]
        self._random = random.Random(0)
        self.killed: list[int] = []
        self._kills = kills
        self.ended = threading.Event()

    def run(self) -> None:
        """Kill, each process once; a rank that has recorded nothing yet is met at its start."""
        pids: set[int] = set()
        while len(self.killed) < self._kills and not self.ended.is_set():
            rank = self._random.choice((0, 1))
            record = ProcessRecord.read(self._files[rank])
            if record is None or record.pid in pids or not is_alive(record):
                self.ended.wait(0.02)
                continue
            self.ended.wait(self._random.uniform(0.0, 0.6))  # as long as training takes
            pids.add(record.pid)
            now = ProcessRecord.read(self._files[rank])
            if now is not None and now.state == "finished":
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGKILL)
                self.killed.append(rank)


@pytest.mark.timeout(2400)
def test_ranks_that_are_killed_at_random_moments_end_as_if_undisturbed(tmp_path, undisturbed):
    killer = Killer(tmp_path / "run", kills=30)
    killer.start()
    how = {"restarts": 60, "keeps_state": True, "limit_s": 2000.0}
    done = launch(tmp_path / "run", "--standalone", **how)
    killer.ended.set()
    killer.join()
    assert done.returncode == 0, done.stderr[-3000:]
    assert histories(tmp_path / "run") == undisturbed
    attempts = read_attempts([tmp_path / "run"])
    print(f"{len(killer.killed)} kills, {len(attempts)} attempts")
    assert len(killer.killed) >= 5
    assert [each.state for each in attempts][-1] == "finished"
    # A rank that is killed while its process ends has finished; torchrun starts it again.
    assert {each.state for each in attempts[:-1]} <= {"failed", "finished"}
    assert sum(each.state == "failed" for each in attempts) >= len(attempts) / 2


@pytest.mark.parametrize("how", ["nan", "raise"])
def test_a_death_in_each_attempt_is_told_to_be_the_same(tmp_path, how):
    done = launch(tmp_path / "run", "--standalone", fault={"at": 15, "how": how, "rank": 1})
    assert done.returncode == 1
    attempts = read_attempts([tmp_path / "run"])
    assert [each.iteration for each in attempts] == [15] * 4
    assert same_deaths(attempts) == 4
    assert attempts[-1].exit_status == 65
    assert "esper: 4 attempts have died in iteration 15 of the same error." in done.stderr
    assert "exitcode  : 65" in done.stderr


@pytest.mark.parametrize("words", [("--master-port=0",), ("--rdzv-backend=c10d",)], ids=str)
def test_ranks_of_each_rendezvous_find_each_other_again(tmp_path, undisturbed, words):
    fault = {"at": 25, "how": "kill", "rank": 1, "once": str(tmp_path / "once")}
    if words == ("--master-port=0",):
        from lightning.fabric.plugins.environments.lightning import (  # noqa: PLC0415
            find_free_network_port,
        )

        words = (f"--master-port={find_free_network_port()}",)
    else:
        words = (*words, "--rdzv-endpoint=localhost:0")
    done = launch(tmp_path / "run", *words, fault=fault)
    assert done.returncode == 0, done.stderr
    assert histories(tmp_path / "run") == undisturbed
