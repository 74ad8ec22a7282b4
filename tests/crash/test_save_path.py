"""``train_ppo_vectorized(save_path=...)``: a signal ends the run, and the best policy is there."""

import signal
import time

import pytest

from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.checkpoint.files import read_checkpoint
from tests import forked

pytestmark = pytest.mark.crash

PROGRAM = """
from esper_lightning import PPOConfig, train_ppo_vectorized
from esper_lightning.envs import CartPole

train_ppo_vectorized(
    CartPole(num_envs=4, time_limit=20), iterations=1_000_000, device="cpu", run_dir="run",
    ppo=PPOConfig(rollout_steps=4, minibatches=1), save_path="saved/policy.ckpt",
    evaluate_every=5, eval_episodes=2,
)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal(tmp_path, name):
    files = RunLayout(tmp_path / "run")
    evaluations = files.rank(0).evaluations
    with (tmp_path / "stderr").open("wb") as stderr:
        process = forked.start(["-c", PROGRAM], output=stderr, cwd=tmp_path)
        end = time.monotonic() + 60
        while len(read_json_lines(evaluations)) < 3 and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        status = process.wait(60)
    said = (tmp_path / "stderr").read_text()
    assert status != 0, said
    assert "was not written" not in said
    assert (tmp_path / "saved" / "policy.ckpt").read_bytes() == files.best_checkpoint.read_bytes()
    best = read_checkpoint(files.best_checkpoint)
    assert best["esper_lightning"]["iteration"] % 5 == 0
