"""Stages that a run has given up stay given up where it is resumed, bit for bit."""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from esper_lightning import MLP, PPO
from esper_lightning.envs import Box, EnvSpaces, EnvSpec
from esper_lightning.envs.autoreset import AutoresetEnv, Transition
from esper_lightning.training.checkpoint import stages
from esper_lightning.training.checkpoint.content import STATE_KEY
from tests.training.test_compiled import SMALL, warnings_of

pytestmark = pytest.mark.usefixtures("native_code")
LEVEL = 1.0
CHANGES, SAVES, ENDS = 2, 3, 4  # iterations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Track(EnvSpec):
    """A target to follow, whose speed is a global variable."""

    num_envs: int = 16
    time_limit: int = 80

    def spaces(self):
        return EnvSpaces(obs=Box((1,)), action=Box((1,), low=-1.0, high=1.0))

    def build(self, device, seed):
        return AutoresetEnv(self, device=device, seed=seed)

    def sample_states(self, steps, generator, device):
        shape = (steps, self.num_envs, 2)
        return torch.empty(shape, device=device).uniform_(-1.0, 1.0, generator=generator)

    def observe(self, state):
        return torch.tanh(state.sum(-1, keepdim=True))

    def advance(self, state, action):
        place, target = state.unbind(-1)
        place = place + 0.2 * LEVEL * torch.tanh(action[:, 0] * 1.3)
        target = target + 0.1 * LEVEL * torch.exp(place.sin())
        state = torch.stack((place, target), -1)
        return Transition(state, torch.cos(target - place), terminated=place > 4.0)


class Curriculum(Callback):
    """Raises the level after some iterations, and keeps a checkpoint of a later one."""

    def __init__(self, path: Path, saves: int) -> None:
        self.path, self.saves = path, saves

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        global LEVEL  # noqa: PLW0603 - as curricula of users do
        LEVEL = 1.0 if trainer.global_step < CHANGES else 1.7

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        if trainer.global_step == self.saves and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.fixture
def train(make_trainer, tmp_path):
    path = tmp_path / "kept.ckpt"

    def train(ckpt_path: Path | None = None, saves: int = SAVES, **settings: Any) -> PPO:
        steps = 16 * SMALL.rollout_steps * ENDS
        model = PPO(
            Track(),
            MLP(hidden_sizes=(16,)),
            dataclasses.replace(SMALL, **settings),
            total_env_steps=steps,
            eval_episodes=2,
            iterations_per_epoch=2,
        )
        trainer = make_trainer(callbacks=[Curriculum(path, saves)], limit_val_batches=1)
        trainer.fit(model, ckpt_path=ckpt_path, weights_only=True)
        return model

    train.path = path
    return train


def assert_same_bits(model: PPO, other: PPO) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_run_is_resumed_bit_for_bit_after_a_stage_was_given_up(train, caplog):
    whole = train()
    assert [one for one in warnings_of(caplog) if "LEVEL" in one]
    saved = torch.load(train.path, weights_only=True)
    states = saved[STATE_KEY]["ranks"][0]["stages"]["states"]
    assert [name for name, state in states.items() if state["slower"]] == ["rollout", "evaluation"]
    caplog.clear()
    resumed = train(train.path)
    assert_same_bits(resumed, whole)
    (line,) = warnings_of(caplog)
    assert "as before the checkpoint, by: rollout, evaluation." in line
    assert "warm_start" in line
    assert len(line) <= 200
    after = stages.stages_to_data(resumed._learner, resumed.evaluation, resumed._program)
    before = stages.stages_to_data(whole._learner, whole.evaluation, whole._program)
    assert after == before  # the next comparisons of all stages, too
    states["rollout"]["counts"] = ["many"]
    torch.save(saved, train.path)
    with pytest.raises(ValueError, match=r"stages\.states\.rollout\.counts\.0 is no count"):
        train(train.path)


def test_a_run_is_resumed_bit_for_bit_where_a_value_changes_right_after_the_checkpoint(
    train, caplog
):
    whole = train(saves=CHANGES)
    saved = torch.load(train.path, weights_only=True)
    states = saved[STATE_KEY]["ranks"][0]["stages"]["states"]
    assert not any(state["slower"] for state in states.values())
    assert any(name.startswith("LEVEL (") for name in states["rollout"]["values"])
    caplog.clear()
    assert_same_bits(train(train.path), whole)
    assert [one for one in warnings_of(caplog) if "LEVEL" in one]
    caplog.clear()
    train(train.path, clip=0.1)  # of another setting there is nothing to be the same as
    assert warnings_of(caplog) == []


@pytest.mark.slow
def test_an_older_checkpoint_and_one_of_another_program_are_compiled_anew(train, caplog):
    train()
    saved = torch.load(train.path, weights_only=True)
    older, other = copy.deepcopy(saved), copy.deepcopy(saved)
    del older[STATE_KEY]["ranks"][0]["stages"]
    program = other[STATE_KEY]["ranks"][0]["stages"]["program"]
    own = [name for name in program if name.endswith("test_stages.py")]
    program[own[0]] = "another"
    for checkpoint, said in ((older, []), (other, [f"{own[0]} has changed: rollout, evaluation"])):
        torch.save(checkpoint, train.path)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger=stages.__name__):
            resumed = train(train.path)
        assert warnings_of(caplog) == []
        messages = [r.getMessage() for r in caplog.records if r.name == stages.__name__]
        assert all(one in message for one, message in zip(said, messages, strict=True))
        assert not any(stage.state()["slower"] for stage in resumed._learner.stages.values())
