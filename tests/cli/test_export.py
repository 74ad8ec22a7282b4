"""``esper export`` as a user meets it."""

from pathlib import Path

import pytest
import torch

from esper_lightning import PPOConfig, Recurrent, train_ppo_vectorized
from esper_lightning.cli.main import main
from esper_lightning.envs import CartPole


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ppo = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
    train_ppo_vectorized(
        CartPole(num_envs=4), iterations=4, ppo=ppo, device="cpu", run_dir="run", evaluate_every=2
    )
    return Path("run")


@pytest.mark.parametrize("file_format", [[], ["--format", "torch"], ["--format", "onnx"]])
def test_exports_the_best_of_a_run(run, capsys, file_format):
    capsys.readouterr()
    main(["export", "--ckpt_path", "run", "--output", "new/policy", *file_format])
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "Checkpoint: run/checkpoints/best.ckpt (iteration 4)",
        "-> obs: float32 [batch, 4]",
        "<- action: int64 [batch]",
        "Differs from the original by at most 0 over 1,024 random observations",
        "Policy: new/policy",
    ]
    assert said.err == ""
    assert [path.name for path in Path("new").iterdir()] == ["policy"]


def test_memory_goes_in_and_comes_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ppo = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
    policy = Recurrent(memory_size=3, cell="lstm")
    env = CartPole(num_envs=4)
    train_ppo_vectorized(env, policy=policy, iterations=1, ppo=ppo, device="cpu", run_dir="run")
    main(["export", "--ckpt_path", "run", "--output", "policy"])
    assert capsys.readouterr().out.splitlines()[1:5] == [
        "-> obs: float32 [batch, 4]",
        "-> memory: float32 [batch, 6]",
        "<- action: int64 [batch]",
        "<- next_memory: float32 [batch, 6]",
    ]


def test_another_checkpoint(run, capsys):
    main(["export", "--ckpt_path", "run/checkpoints/last.ckpt", "--output", "policy.pt2"])
    assert "Checkpoint: run/checkpoints/last.ckpt (iteration 4)\n" in capsys.readouterr().out
    main(["export", "--ckpt_path", "run/checkpoints/last.ckpt", "--output", "policy.pt2"])
    assert torch.export.load("policy.pt2").module()(torch.zeros(2, 4)).shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --ckpt_path, --output"),
        (["--ckpt_path", "run"], "the following arguments are required: --output"),
        (
            ["--ckpt_path", "none", "--output", "x"],
            "ckpt_path must name an existing checkpoint, got 'none'.",
        ),
        (
            ["--ckpt_path", ".", "--output", "x"],
            "ckpt_path must name a checkpoint, or a run directory with checkpoints/best.ckpt or",
        ),
        (
            ["--ckpt_path", "run/config.yaml", "--output", "x"],
            "ckpt_path must name a whole checkpoint, got 'run/config.yaml'. It begins with b'mode'",
        ),
        (
            ["--ckpt_path", "run", "--output", "run"],
            "an earlier export, got 'run'. It is a folder.",
        ),
        (["--ckpt_path", "run", "--output", "run/config.yaml/x"], "run/config.yaml"),
        (
            ["--ckpt_path", "run", "--output", "x", "--format", "tflite"],
            "argument --format: invalid choice: 'tflite'",
        ),
        (["--ckpt_path", "run", "--output", "x", "--frmt", "onnx"], "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, capsys, arguments, message):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("esper: error: ")
    assert message in line
    assert not Path("x").exists()
