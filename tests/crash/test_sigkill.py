"""SIGKILL at any moment: no finished iteration is lost, and every file can be read."""

import random
import signal
import time

import pytest

from esper_lightning.cli import crash
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.ppo.metrics import EVAL_RETURN
from esper_lightning.training.checkpoint.files import read_checkpoint
from tests import forked

pytestmark = pytest.mark.crash

PROGRAM = """
import os, sys
from esper_lightning import PPO, PPOConfig
from esper_lightning.callbacks.history import JsonLines
from esper_lightning.envs import CartPole
from esper_lightning.train import run_callbacks, run_plugins
from lightning.pytorch import Trainer

append = JsonLines.append
def counted(self, row):
    append(self, row)
    if "loss/value" in row:  # not an evaluation
        os.write(truth, b".")
truth = os.open(sys.argv[1] + "/truth", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
JsonLines.append = counted
trainer = Trainer(accelerator="cpu", max_epochs=-1, logger=False, plugins=run_plugins(),
    callbacks=run_callbacks(evaluates=True, shows_progress=False),
    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    default_root_dir=sys.argv[1])
trainer.fit(PPO(CartPole(num_envs=4, time_limit=20), eval_episodes=2,
    iterations_per_epoch=5, ppo=PPOConfig(rollout_steps=4, minibatches=1)))
"""


def kill_at_a_random_moment(directory, moment):
    directory.mkdir()
    with (directory.parent / "output").open("ab") as output:
        process = forked.start(["-c", PROGRAM, directory], output=output)
    end = time.monotonic() + 60
    while not (directory / "rank0" / "history.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(moment.uniform(0.0, 0.6))
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def check(directory):
    files = RunLayout(directory).rank(0)
    end = time.monotonic() + 10
    while not files.crash.exists() and time.monotonic() < end:
        time.sleep(0.02)
    finished = len((directory / "truth").read_bytes())
    rows = [row["iteration"] for row in read_json_lines(files.history)]
    assert rows == list(range(1, len(rows) + 1))
    assert len(rows) >= finished  # a row may be on disk before it could be counted
    (remains,) = crash.examine(directory)
    assert remains.report.cause == "vanished"
    assert remains.report.complete
    assert remains.phases is not None
    check_checkpoints(RunLayout(directory), read_json_lines(files.evaluations))


def check_checkpoints(layout, evaluations):
    if len(evaluations) < 2:  # the latest may have been killed before its checkpoint
        return
    best, last = map(read_checkpoint, (layout.best_checkpoint, layout.last_checkpoint))
    (score,) = (
        s["best_model_score"].item() for s in best["callbacks"].values() if s.get("monitor")
    )
    winners = [
        max((row[EVAL_RETURN], row["iteration"]) for row in rows)
        for rows in (evaluations, evaluations[:-1])
    ]
    assert (score, best["esper_lightning"]["iteration"]) in winners
    assert last["esper_lightning"]["iteration"] >= evaluations[-2]["iteration"]


@pytest.mark.parametrize("number", range(4))
def test_sigkill(tmp_path, number):
    kill_at_a_random_moment(tmp_path / "run", random.Random(number))
    check(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigkill_at_a_hundred_moments(tmp_path):
    for number in range(100):
        directory = tmp_path / str(number)
        kill_at_a_random_moment(directory, random.Random(1000 + number))
        check(directory)
