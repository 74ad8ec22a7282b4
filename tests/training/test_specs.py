"""Specs written as plain data come back as they were."""

import dataclasses
from typing import Any

import pytest
import torch

from esper_lightning import MLP, PPOConfig
from esper_lightning.envs import CartPole, EnvSpec
from esper_lightning.training.settings import PPOSettings
from esper_lightning.training.specs import (
    evaluation_spec,
    first_difference,
    spec_from_data,
    spec_to_data,
    to_data,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(EnvSpec):
    """Settings of every kind."""

    num_envs: int = 4
    sizes: Any = ()
    total: int = dataclasses.field(default=0, init=False)

    def __post_init__(self):
        object.__setattr__(self, "total", self.num_envs)

    def spaces(self):
        return CartPole().spaces()

    def build(self, device, seed):
        raise NotImplementedError


def again(spec: EnvSpec) -> EnvSpec:
    """The spec rebuilt from the plain data that a checkpoint holds."""
    saved = {"env": spec_to_data(spec), "policy": spec_to_data(MLP()), "ppo": to_data(PPOConfig())}
    return PPOSettings.from_data(saved).env


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 2),
        ((1, 2), (3,), ()),
        (((1.5, None), ("a", True)), ((),)),
        {"a": (1, 2), "b": {"c": ((3,),)}},
    ],
    ids=str,
)
def test_tuples_come_back_as_tuples_all_the_way_down(sizes):
    spec = Odd(sizes=sizes)
    assert repr(again(spec)) == repr(spec)


def test_what_is_stored_is_plain_data_all_the_way_down():
    nested = to_data({"specs": (CartPole(num_envs=2), [CartPole(num_envs=3)])})
    assert nested["specs"][0] == spec_to_data(CartPole(num_envs=2))
    assert nested["specs"][0]["init_args"]["num_envs"] == 2
    assert nested["specs"][1][0]["init_args"]["num_envs"] == 3
    assert to_data((torch.float32,)) == [{"repr()": "torch.float32"}]


def test_a_field_that_is_no_argument_is_no_setting():
    assert spec_to_data(Odd(num_envs=7))["init_args"] == {"num_envs": 7, "sizes": []}
    assert again(Odd(num_envs=7)).total == 7


@pytest.mark.parametrize("sizes", [torch.float32, (torch.float32,), {"a": {"b": torch.float32}}])
def test_what_is_no_plain_data_is_refused_wherever_it_is(sizes):
    with pytest.raises(ValueError, match=r"torch.float32 is not plain data. Pass env yourself."):
        again(Odd(sizes=sizes))


def test_an_evaluation_has_a_hundred_episodes_by_default():
    spec = CartPole(num_envs=4)
    assert evaluation_spec(spec, None).num_envs == 100
    assert evaluation_spec(spec, 3) == CartPole(num_envs=3)
    assert evaluation_spec(spec, 4) is spec


def test_the_first_setting_that_differs_is_named() -> None:
    one = {"env": {"class_path": "A", "init_args": {"n": 1, "m": 2}}, "ppo": {"clip": 0.2}}
    other = {"env": {"class_path": "A", "init_args": {"n": 1, "m": 3}}, "ppo": {"clip": 0.1}}
    assert first_difference("PPO", [one, one]) == ("PPO", [])
    assert first_difference("PPO", [one, other, one]) == ("PPO.env.m", [2, 3, 2])
    assert first_difference("PPO", [{"seed": 1}, {}]) == ("PPO.seed", [1, None])
    assert first_difference("PPO", [{"env": one}, {"env": 3}]) == ("PPO.env", [one, 3])


def test_a_spec_with_settings_that_were_not_stored_is_not_rebuilt_with_other_ones():
    data = {"class_path": f"{__name__}.Opaque", "init_args": {}}
    with pytest.raises(ValueError, match=r"settings were not stored.* Pass env yourself"):
        spec_from_data(data, owner="env", kind=EnvSpec)


class Opaque(EnvSpec):
    num_envs = 2

    def __init__(self, limit: int = 500) -> None:
        self.limit = limit

    def spaces(self):
        return CartPole().spaces()

    def build(self, device, seed):
        return CartPole(num_envs=2, time_limit=self.limit).build(device, seed)
