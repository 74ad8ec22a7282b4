"""A policy leaves the simulator behind in which it was trained: checkpoints hold its spaces."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from esper_lightning import MLP, PPO, PPOConfig
from esper_lightning.core.spaces import (
    Box,
    Discrete,
    EnvSpaces,
    FactoredDiscrete,
    Head,
    MultiDiscrete,
)
from esper_lightning.envs import CartPole, Gymnasium
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.spaces import spaces_from_data, spaces_to_data
from tests import forked

SMALL = PPOConfig(rollout_steps=8, minibatches=2, epochs=1, normalize_obs=True)
KINDS = [
    EnvSpaces(obs=Box((3,), -math.inf, (1.0, 2.0, math.inf)), action=Box((2,), -1.0, 1.0)),
    EnvSpaces(obs=Box((3, 8, 8), 0.0, 255.0, dtype="uint8"), action=Discrete(4), masked=True),
    EnvSpaces(obs={"a": Box((2,)), "b": Box((1, 2))}, action=MultiDiscrete((2, 3))),
    EnvSpaces(
        obs=Box((1,)), action=FactoredDiscrete((Head("do", 3), Head("where", 2, (1, 2), True)))
    ),
]
ALONE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("gymnasium", "mujoco"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in [n for n in sys.modules if n.partition(".")[0] in ("gymnasium", "mujoco")]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())

import torch
from lightning.pytorch import Trainer
from esper_lightning import PPO
from esper_lightning.cli.export import run
from esper_lightning.envs import Pendulum

path, output = sys.argv[1:]
model = PPO.load_from_checkpoint(path)
obs = torch.linspace(-1, 1, 15).view(5, 3)
print(model.policy.act_deterministically(model.obs_normalizer(obs), None).flatten().tolist())
run(["--ckpt_path", path, "--output", output])
other = PPO.load_from_checkpoint(path, env=Pendulum(num_envs=4), eval_episodes=4)
quiet = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}
print(Trainer(**quiet).validate(other, verbose=False)[0]["eval/episodes"])
try:
    Trainer(**quiet).validate(model, verbose=False)
except ValueError as error:
    print(error)
print(model.settings.to_data()["env"])
"""


@pytest.mark.parametrize("spaces", KINDS, ids=lambda spaces: type(spaces.action).__name__)
def test_spaces_become_data_and_spaces_again(spaces, tmp_path):
    torch.save(spaces_to_data(spaces, 4), tmp_path / "spaces")
    assert spaces_from_data(torch.load(tmp_path / "spaces", weights_only=True)) == spaces


@pytest.mark.parametrize("data", [
    None, {}, {"obs": {"": {"shape": (2,)}}}, {"obs": {"": 3}, "action": {}, "masked": False},
    {"obs": {"": {"shape": (2,)}}, "action": {"kind": "Text"}, "masked": False},
    {"obs": {"": {"shape": (2,), "wings": 2}}, "action": {"kind": "Box"}, "masked": False},
])  # fmt: skip
def test_what_describes_no_spaces_is_refused(data):
    with pytest.raises(ValueError, match=r"^The checkpoint's"):
        spaces_from_data(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a run in a simulator of others, and the actions of its policy."""
    path = tmp_path_factory.mktemp("simulator") / "run.ckpt"
    env = Gymnasium(id="Pendulum-v1", num_envs=4)
    model = PPO(env=env, policy=MLP(hidden_sizes=(8,)), ppo=SMALL)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=2, accelerator="cpu", limit_val_batches=0, **quiet)
    trainer.fit(model)
    trainer.save_checkpoint(path)
    return path, model


@pytest.mark.filterwarnings("ignore:.*num_workers.*")
def test_a_policy_is_loaded_exported_and_evaluated_without_its_simulator(saved, tmp_path):
    path, model = saved
    (tmp_path / "alone.py").write_text(ALONE)
    output = tmp_path / "policy.pt2"
    done = forked.run([tmp_path / "alone.py", str(path), str(output)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    obs = torch.linspace(-1, 1, 15).view(5, 3)
    expected = model.policy.act_deterministically(model.obs_normalizer(obs), None)
    assert lines[0] == str(expected.flatten().tolist())
    assert any(line.startswith("Policy: ") for line in lines)
    exported = torch.export.load(output).module()
    torch.testing.assert_close(exported(obs), model.policy.to_env(expected))
    *_, episodes, error, data = lines
    assert float(episodes) == 4
    assert error.startswith("Pendulum-v1 cannot be built here: Gymnasium.id='Pendulum-v1' needs")
    assert data == str(model.settings.to_data()["env"])


def test_a_checkpoint_without_spaces_is_loaded_where_its_environment_is(saved, tmp_path):
    path, model = saved
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[STATE_KEY]["spaces"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    loaded = PPO.load_from_checkpoint(tmp_path / "old.ckpt")
    assert loaded.env == model.env


class TestAnEnvironmentThatCannotBeImported:
    def write(self, path, tmp_path, change):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["hyper_parameters"]["env"]["class_path"] = "my_lab.envs.Arm"
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "run.ckpt")
        return tmp_path / "run.ckpt"

    def test_it_is_not_needed_for_its_policy(self, saved, tmp_path, caplog):
        path = self.write(saved[0], tmp_path, lambda checkpoint: None)
        model = PPO.load_from_checkpoint(path)
        assert model.env.num_envs == 4
        assert model.env_spaces == saved[1].env_spaces
        assert "Without the environment the policy is loaded alone" in caplog.text

    def test_it_is_needed_without_stored_spaces(self, saved, tmp_path):
        path = self.write(saved[0], tmp_path, lambda c: c[STATE_KEY].pop("spaces"))
        with pytest.raises(ValueError, match=r"env must be a spec that my_lab\.envs\.Arm builds"):
            PPO.load_from_checkpoint(path)


def test_an_environment_that_is_here_is_the_checkpoints(tmp_path):
    model = PPO(env=CartPole(num_envs=4), ppo=SMALL)
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert PPO.load_from_checkpoint(tmp_path / "run.ckpt").env == CartPole(num_envs=4)
