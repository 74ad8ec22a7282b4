"""Specs written as plain data come back as they were."""

import dataclasses
import io
import json
from enum import Enum, Flag, StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from esper_lightning import MLP, PPO, RND, PPOConfig
from esper_lightning.envs import CartPole, EnvSpec
from esper_lightning.policies import Composed, EncoderSpec, Flat, Groups, PolicySpec
from esper_lightning.ppo import Extension, ExtensionSpec
from esper_lightning.training.settings import PPOSettings
from esper_lightning.training.specs import (
    evaluation_spec,
    first_difference,
    refuse_opaque,
    spec_from_data,
    spec_to_data,
    to_data,
    with_defaults,
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


class Gait(Enum):
    WALK = ("slow", 1)
    RUN = ("fast", 2)


class Colour(StrEnum):
    RED = "r"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    low: float = 0.0
    gait: Gait = Gait.WALK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rough:
    """Has fields with the names of those of ``Limits``, as alternatives often have."""

    low: float = 0.0
    gait: Gait = Gait.WALK


class Sides(Flag):
    LEFT = 1
    RIGHT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class NarrowLimits(Limits):
    """A subclass without fields of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotated(Odd):
    """Settings whose annotations say what their plain data mean."""

    gait: Gait = Gait.WALK
    other: Gait | None = None
    colour: Colour = Colour.RED
    size: Literal["small", "large"] = "small"
    file: Path = Path("model.xml")
    pair: tuple[Gait, Path] = (Gait.WALK, Path("a"))
    gaits: tuple[Gait, ...] = ()
    named: dict[str, Gait] = dataclasses.field(default_factory=dict)
    listed: list[int] = dataclasses.field(default_factory=list)
    limits: Limits = Limits()
    text_or_path: str | Path = "a"
    by_gait: dict[Gait, Path] = dataclasses.field(default_factory=dict)
    by_pair: dict[tuple[Gait, int], Limits] | None = None
    ground: Limits | Rough | None = None


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gait": Gait.RUN, "other": Gait.RUN},
        {"file": Path("/b/c"), "size": "large", "text_or_path": "b"},
        {"pair": (Gait.RUN, Path("b")), "gaits": (Gait.RUN, Gait.WALK)},
        {"named": {"x": Gait.RUN, "y": Gait.WALK}, "listed": [1, 2]},
        {"limits": Limits(low=1.0, gait=Gait.RUN)},
        {"by_gait": {Gait.RUN: Path("a"), Gait.WALK: Path("b")}},
        {"by_pair": {(Gait.RUN, 1): Limits(low=2.0)}},
    ],
    ids=str,
)
def test_members_of_enums_paths_and_dataclasses_come_back_as_their_annotations_say(changes):
    spec = Annotated(**changes)
    data = read_by_torch(spec_to_data(spec))
    refuse_opaque("env", data)
    assert again(spec) == spec


def read_by_torch(data: Any) -> Any:
    """Plain data after ``torch.load`` of a checkpoint, which builds no other objects."""
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_path_is_stored_as_the_text_that_its_setting_takes_too():
    assert again(Annotated(text_or_path=Path("b/c"))).text_or_path == "b/c"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ground", Rough(low=1.0)),
        ("limits", NarrowLimits()),
        ("sizes", Limits()),
        ("sizes", (Limits(),)),
        ("sizes", {Gait.RUN: 1.0}),
        ("sizes", {(1, Path("a")): 1.0}),
        ("sizes", Sides.LEFT | Sides.RIGHT),
    ],
)
def test_what_annotations_do_not_tell_apart_is_refused_and_never_built_as_another(setting, value):
    spec = Annotated(**{setting: value})
    data = read_by_torch(spec_to_data(spec))
    with pytest.raises(ValueError, match=rf"^env.{setting} must be plain data"):
        refuse_opaque("env", data)
    with pytest.raises(ValueError, match=r"is not plain data. Pass env yourself."):
        again(spec)


def test_a_checkpoint_of_an_earlier_version_with_a_dataclass_of_several_is_resumed():
    spec = Annotated(ground=Rough(low=1.0))
    stored = spec_to_data(spec)
    stored["init_args"]["ground"] = {"low": 1.0, "gait": "WALK"}
    assert with_defaults(stored, spec) == spec_to_data(spec)
    stored["init_args"]["ground"]["low"] = 2.0
    assert with_defaults(stored, spec) != spec_to_data(spec)


def test_only_plain_types_are_stored_so_that_a_checkpoint_can_be_read():
    assert spec_to_data(Annotated())["init_args"]["colour"] == "RED"
    assert to_data(Colour.RED) == {"repr()": "<Colour.RED: 'r'>"}
    assert [type(to_data(value)) for value in (True, np.float64(2), None)] == [
        bool,
        float,
        type(None),
    ]
    opaque = spec_to_data(Odd(sizes=(1, Gait.RUN)))
    with pytest.raises(ValueError, match=r"^env.sizes must be plain data .*, got <Gait.RUN.*>\."):
        refuse_opaque("env", opaque)


def test_a_checkpoint_of_an_earlier_version_with_a_member_of_an_enum_is_resumed():
    spec = Annotated(gait=Gait.RUN)
    stored = spec_to_data(spec)
    stored["init_args"]["gait"] = {"repr()": repr(Gait.RUN)}
    assert with_defaults(stored, spec) == spec_to_data(spec)
    assert with_defaults(stored, Annotated()) != spec_to_data(Annotated())


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


class Holder:
    """A spec that holds anything, and builds nothing."""

    def spaces(self):
        return CartPole().spaces()

    def build(self, *_):
        raise NotImplementedError

    build_encoder = build


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldingEnv(Holder, EnvSpec):
    num_envs: int = 4
    inner: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldingPolicy(Holder, PolicySpec):
    inner: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldingEncoder(Holder, EncoderSpec):
    inner: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldingExtension(Holder, ExtensionSpec):
    inner: Any = None


INNER = {
    "env": CartPole(num_envs=3),
    "policy": MLP(hidden_sizes=(8,)),
    "encoder": Groups(encoders={"image": Flat(hidden_sizes=(5,))}),
    "extension": RND(features=3),
    "policy with an encoder": Composed(encoder=Flat(hidden_sizes=(4,))),
    "policy with an extension with an env": HoldingPolicy(inner=HoldingExtension(inner=CartPole())),
}
HOLDERS = {
    HoldingEnv: EnvSpec,
    HoldingPolicy: PolicySpec,
    HoldingEncoder: EncoderSpec,
    HoldingExtension: ExtensionSpec,
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_spec_comes_back_within_each_kind_of_spec(holder, inner):
    for value in (inner, (inner, inner), {"a": inner, "b": ((inner,),)}):
        spec = holder(inner=value)
        data = json.loads(json.dumps(spec_to_data(spec)))
        assert spec_from_data(data, owner="x", kind=HOLDERS[holder]) == spec


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A policy spec that does not derive from ``PolicySpec``."""

    width: int = 8

    def build(self, spaces, generator):
        return MLP(hidden_sizes=(self.width,)).build(spaces, generator)


def test_a_class_that_only_has_a_method_build_is_never_built_within_a_spec():
    data = spec_to_data(HoldingExtension(inner=Foreign()))
    with pytest.raises(ValueError, match=r"Foreign\(width=8\) is not plain data. Pass x yourself."):
        spec_from_data(data, owner="x", kind=ExtensionSpec)
    data["init_args"]["inner"] = spec_to_data(Foreign())
    with pytest.raises(ValueError, match=r"Foreign builds: it is no EncoderSpec or EnvSpec or "):
        spec_from_data(data, owner="x", kind=ExtensionSpec)
    again = spec_from_data(spec_to_data(Foreign()), owner="policy", kind=PolicySpec)
    assert again == Foreign()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(ExtensionSpec):
    """A term of the loss by which the policy imitates a teacher, which another spec builds."""

    teacher: PolicySpec = MLP()  # noqa: RUF009 - frozen

    def build(self, spaces, generator):
        return Distillation(self.teacher.build(spaces, generator))


class Distillation(Extension):
    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher.requires_grad_(False)

    def losses(self, batch, kept, evaluate):
        return {"distill": (evaluate(batch).value - self.teacher.value(batch.obs)).square()}


def test_a_run_with_a_policy_within_an_extension_is_loaded(make_trainer, tmp_path):
    extension = Distill(teacher=MLP(hidden_sizes=(8,)))
    ppo = PPOConfig(rollout_steps=4, minibatches=2, epochs=1)
    model = PPO(CartPole(num_envs=4), MLP(hidden_sizes=(8,)), ppo, extensions=(extension,))
    trainer = make_trainer(max_steps=1)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = PPO.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.settings == model.settings
    assert loaded.settings.extensions == (extension,)
