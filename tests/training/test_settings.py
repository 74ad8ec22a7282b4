"""Settings of PPO are checked, and come back from plain data as they were."""

import dataclasses
import inspect
import json

import pytest

from esper_lightning import MLP, PPO, RND, PPOConfig, Recurrent
from esper_lightning.envs import CartPole, Pendulum
from esper_lightning.training.settings import PPOSettings

OTHER = PPOSettings(
    env=Pendulum(num_envs=7),
    policy=Recurrent(cell="lstm"),
    ppo=PPOConfig(rollout_steps=12, minibatches=7),
    seed=5,
    total_env_steps=1000,
    iterations_per_epoch=3,
    eval_episodes=11,
    compile="default",
    warm_start="x.ckpt",
    extensions=(RND(features=3),),
    redeal=True,
)


def test_the_fields_are_the_arguments_of_ppo_with_their_defaults():
    arguments = dict(inspect.signature(PPO).parameters)
    fields = {field.name: field for field in dataclasses.fields(PPOSettings)}
    assert list(arguments) == list(fields)
    for name, field in fields.items():
        empty = field.default is dataclasses.MISSING
        assert arguments[name].default == (inspect.Parameter.empty if empty else field.default)
        assert arguments[name].annotation == field.type


@pytest.mark.parametrize("name", inspect.signature(PPO).parameters)
def test_every_argument_of_ppo_reaches_its_settings(name):
    value = getattr(OTHER, name)
    assert value != getattr(PPOSettings, name, None), "OTHER needs an example of this setting"
    env = CartPole(num_envs=28)
    settings = PPO(**{"env": env, name: value}).settings
    assert settings == dataclasses.replace(PPOSettings(env=env), **{name: value})


@pytest.mark.parametrize("settings", [OTHER, PPOSettings(env=CartPole())], ids=["other", "default"])
def test_plain_data_gives_the_same_settings(settings):
    data = settings.to_data()
    assert PPOSettings.from_data(json.loads(json.dumps(data))) == settings
    assert PPOSettings.from_data(data, seed=9) == dataclasses.replace(settings, seed=9)
    assert PPOSettings.from_data({**data, "of another version": 1}) == settings


def test_a_module_stores_its_settings_under_the_names_of_its_arguments():
    model = PPO(**dataclasses.replace(OTHER, policy=MLP(), compile="off").arguments())
    assert dict(model.hparams) == model.settings.to_data()
    assert list(model.hparams) == list(inspect.signature(PPO).parameters)
    assert model.hparams["ppo"]["rollout_steps"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": CartPole}, "PPO.env must be an environment spec"),
        ({"policy": CartPole()}, "PPO.policy must be a policy spec"),
        ({"seed": "0"}, "PPO.seed must be an integer, got '0'"),
        (
            {"total_env_steps": 63},
            "PPO.total_env_steps must be at least env.num_envs = 64",
        ),
        ({"iterations_per_epoch": 0}, "PPO.iterations_per_epoch must be at least 1, got 0"),
        ({"eval_episodes": 0}, "PPO.eval_episodes must be at least 1, got 0"),
        ({"compile": "fast"}, "PPO.compile must be "),
        ({"warm_start": 1}, "PPO.warm_start must be "),
    ],
)
def test_nonsense_is_refused_in_the_name_of_ppo(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PPOSettings(**{"env": CartPole(num_envs=64), **changes})


def test_a_checkpoint_with_other_fields_of_ppo_config_is_refused():
    data = OTHER.to_data()
    data["ppo"] = {**data["ppo"], "gone": 1}
    with pytest.raises(ValueError, match=r"^ckpt_path must hold settings of PPO: .*'gone'"):
        PPOSettings.from_data(data)
