"""A minibatch of which a run died is computed again, and the first bad value is located."""

import math

import pytest
import torch
from torch import nn

from esper_lightning import PPO, Composed, FlightRecorder, PPOConfig
from esper_lightning.cli.replay import run
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.envs import CartPole
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.failing_minibatch import examine_minibatch


class Roots(nn.Module):
    """Features whose value is finite and whose gradient is not: the root of 0 has no slope."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        features = self.layer(obs)
        return features + (features - features.detach()).square().sqrt()


def make(space: object) -> nn.Module:
    return Roots()


@pytest.fixture
def dead(make_trainer, tmp_path):
    """Folder of a rank that died in an update."""
    model = PPO(
        env=CartPole(num_envs=4),
        policy=Composed(encoder=f"{__name__}:make"),
        ppo=PPOConfig(rollout_steps=4, minibatches=2, epochs=1),
        compile="off",
    )
    recorder = FlightRecorder(tmp_path / "run", watch=False)
    with pytest.raises(NonFiniteError, match="PPO's gradient must be finite"):
        make_trainer(callbacks=[recorder], max_steps=3).fit(model)
    return RunLayout(tmp_path / "run").rank(0)


def rewrite(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_the_operation_whose_gradient_is_not_finite_is_named_with_its_line(dead):
    finding = examine_minibatch(dead)
    text = "\n".join(finding.lines)
    assert finding.found
    assert "arises in the backward pass" in text
    assert "SqrtBackward0" in text
    assert "return features + (features - features.detach()).square().sqrt()" in text


def test_the_operation_whose_result_is_not_finite_is_named(dead):
    rewrite(dead.bad_minibatch, lambda batch: batch["log_prob"].fill_(-200.0))
    finding = examine_minibatch(dead)
    text = "\n".join(finding.lines)
    assert finding.found
    assert "arises in the forward pass, in aten.exp" in text  # the ratio of probabilities
    assert "not finite in 0, 1, 2, 3, 4, 5, 6, 7 of its first axis" in text
    assert "losses.py" in text


@pytest.mark.parametrize("what", ["inputs", "weights", "nothing"])
def test_what_is_not_finite_before_is_named_and_what_is_finite_too(dead, what, monkeypatch):
    if what == "inputs":
        rewrite(dead.bad_minibatch, lambda batch: batch["advantage"][2:4].fill_(math.nan))
    elif what == "weights":

        def spoil(checkpoint):
            key = next(k for k in checkpoint["state_dict"] if k.endswith("layer.bias"))
            checkpoint["state_dict"][key][0] = math.inf

        rewrite(dead.crash_checkpoint, spoil)
    else:
        monkeypatch.setattr(Roots, "forward", lambda roots, obs: roots.layer(obs))
    finding = examine_minibatch(dead)
    text = "\n".join(finding.lines)
    said = {
        "inputs": "Not finite before anything is computed: advantage, in 2, 3",
        "weights": "Weights are not finite: ",
        "nothing": "Every value is finite this time.",
    }
    assert said[what] in text
    assert finding.found == (what != "nothing")


def test_a_step_of_a_rollout_says_where_its_values_are(dead):
    torch.save({"reward": torch.tensor([0.0, math.nan])}, dead.bad_minibatch)
    finding = examine_minibatch(dead)
    assert finding.lines[1] == "Not finite before anything is computed: reward, in 1"
    assert "one step of a rollout" in finding.lines[2]


def test_the_command_ends_with_the_verdict(dead, capsys):
    with pytest.raises(SystemExit) as ended:
        run(["--minibatch", str(dead.directory.parent)])
    assert ended.value.code == 0
    assert "arises in the backward pass" in capsys.readouterr().out


def test_a_run_without_a_minibatch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="RUN_DIR must hold the minibatch of a run that died"):
        examine_minibatch(RunLayout(tmp_path).rank(0))
