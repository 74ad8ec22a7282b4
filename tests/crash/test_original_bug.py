"""The three ways in which the original trainer lost its evidence, in one process."""

import gzip
import itertools
import json
import os
import signal

import pytest
import torch

from esper_lightning import PPOConfig, train_ppo_vectorized
from esper_lightning.envs import CartPole
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.ppo.learner import Learner
from tests.reports import read_report

pytestmark = pytest.mark.crash


def out_of_memory():
    torch.empty(1 << 60)


def nan():
    raise ValueError("NaN")


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("fault", "error"),
    [(out_of_memory, RuntimeError), (nan, ValueError), (ctrl_c, SystemExit)],
)
def test_the_original_bug(tmp_path, monkeypatch, capfd, fault, error):
    def train(run_dir, iterations):
        return train_ppo_vectorized(
            CartPole(num_envs=8),
            iterations=iterations,
            ppo=PPOConfig(rollout_steps=4, minibatches=1),
            device="cpu",
            run_dir=run_dir,
            torch_profiler=True,
            torch_profiler_summary=True,
            torch_profiler_active=20,
        )

    rollout, calls = Learner.rollout, itertools.count(1)

    def dies(learner, steps):
        collected = rollout(learner, steps)
        if next(calls) == 7:
            torch.special.erfcx(torch.ones(1))
            fault()
        return collected

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Learner, "rollout", dies)
    with pytest.raises(error) as caught:
        train(tmp_path / "run", 12)
    notes = getattr(caught.value, "__notes__", [])
    assert any(str(tmp_path / "run") in note for note in notes)
    assert "Self CPU" in capfd.readouterr().out
    files = tmp_path / "run" / "rank0"
    (trace,) = (files / "trace").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::special_erfcx", "[pl][profile]rollout", "[pl][profile]update"} <= names
    rows = [row["iteration"] for row in read_json_lines(files / "history.jsonl")]
    assert rows == [1, 2, 3, 4, 5, 6]
    report = read_report(files / "crash.json")
    assert report["phases"][-1] == "rollout"
    assert report["iteration"] == 7
    assert torch.load(files / "crash.ckpt", weights_only=True)["crash"]["finite"]
    assert not torch._C._autograd._profiler_enabled()
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert len(train(tmp_path / "next", 6)) == 6
