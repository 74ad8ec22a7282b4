"""Every setting that users write refuses nonsense by its name; introspection finds the settings."""

import dataclasses
import inspect
import math
import typing
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from esper_lightning import (
    CNN,
    MLP,
    PPO,
    BestCheckpoint,
    Composed,
    FlightRecorder,
    History,
    PPOConfig,
    Recurrent,
    check_env,
    train_ppo_vectorized,
)
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces, FactoredDiscrete, Head
from esper_lightning.core.spaces import MultiDiscrete as Multi
from esper_lightning.envs import Acrobot, CartPole, Morphogenesis, MountainCar, Pendulum
from esper_lightning.policies import Image, Imported
from esper_lightning.recorder.profiling.window_profiler import WindowProfiler

SMALL = CartPole(num_envs=2)
HEAD = Head("op", 2)
BARE = (
    *(PPOConfig, CNN, MLP, Recurrent, CartPole, Acrobot, MountainCar, Pendulum, Morphogenesis),
    *(Image, FlightRecorder, History, WindowProfiler, BestCheckpoint),
)
OWNERS = {  # what must be given beside the setting in question
    **{owner: {} for owner in BARE},
    Composed: {"encoder": "networks:Net"},
    Imported: {"path": "networks:Net"},
    Box: {"shape": (2,)},
    Discrete: {"n": 2},
    Multi: {"nvec": (2, 2)},
    Head: {"name": "op", "size": 2},
    FactoredDiscrete: {"heads": (HEAD,)},
    EnvSpaces: {"obs": Box((2,)), "action": Discrete(2)},
    PPO: {"env": SMALL},
    train_ppo_vectorized: {"env": SMALL, "iterations": 1},
    check_env: {"env": SMALL, "steps": 1},
}


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


NONSENSE = {
    "text": "1e-3",
    "empty text": "",
    "none": None,
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "negative": -1,
    "negative float": -0.5,
    "zero": 0,
    "bool": True,
    "float": 2.5,
    "whole float": 2.0,
    "huge": 10**400,
    "beyond printing": 10**6000,
    "64 bits": 2**63 - 1,
    "complex": 1j,
    "dict": {},
    "set": {1},
    "empty tuple": (),
    "tuple of text": ("a", "b"),
    "tuple of nan": (math.nan, 1.0),
    "tuple of none": (None,),
    "nested": ((1,), (2,)),
    "class": int,
    "tensor": torch.ones(2),
    "scalar tensor": torch.tensor(3),
    "array": np.arange(3),
    "unprintable": Unprintable(),
    "bytes": b"x",
    "function": len,
}


def settings_of(owner: typing.Any) -> list[str]:
    if dataclasses.is_dataclass(owner):
        return [field.name for field in dataclasses.fields(owner) if field.init]
    function = owner.__init__ if isinstance(owner, type) else owner
    return [name for name in inspect.signature(function).parameters if name != "self"]


def kinds_of(owner: typing.Any) -> dict[str, typing.Any]:
    if dataclasses.is_dataclass(owner):
        return {field.name: field.type for field in dataclasses.fields(owner)}
    return (owner.__init__ if isinstance(owner, type) else owner).__annotations__


ALIASES = {  # what is said of a setting in the words of something that it is handed to
    "iterations": "PPO.total_env_steps",
    "devices": "PPO.total_env_steps",
    "resume_path": "ckpt_path",
    "env": "members",
    "torch_profiler_wait": "torch_profiler_wait + torch_profiler_warmup",
}
EVERY = [(owner, name) for owner in OWNERS for name in settings_of(owner)]
NAMES = [f"{owner.__name__}.{name}" for owner, name in EVERY]


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch, tmp_path):
    """Run without the type checks of the tests, and end a run that begins: it refused nothing."""
    jaxtyping.config.update("jaxtyping_disable", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("esper_lightning.train.run_logger", _begins)
    monkeypatch.setattr("esper_lightning.envs.check._check_spec", _begins)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class BegunError(Exception):
    pass


def _begins(*args, **kwargs):
    raise BegunError


def refusal(owner, name, value) -> str | None:
    """The error about a value; ``None`` if the value is accepted."""
    try:
        owner(**{**OWNERS[owner], name: value})
    except BegunError:
        return None
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("owner", "name"), EVERY, ids=NAMES)
def test_nonsense_is_refused_by_name_and_in_one_line(owner, name):
    for what, value in NONSENSE.items():
        said = refusal(owner, name, value)
        if said is not None:
            assert " must " in said, (what, said)
            named = said.split(" must ")[0]
            assert name in named or ALIASES.get(name, owner.__name__) in named, (what, said)
            assert "\n" not in said, what
            assert len(said) < 500, what


def accepts(kind: typing.Any, wanted: type) -> bool:
    return wanted in (kind, *typing.get_args(kind))


@pytest.mark.parametrize(("owner", "name"), EVERY, ids=NAMES)
def test_another_type_is_never_accepted(owner, name):
    kind = kinds_of(owner)[name]
    never = ["complex", "set", "class", "tensor", "array", "unprintable", "function", "bytes"]
    never += ["scalar tensor", "huge", "beyond printing", "nested", "tuple of none"]
    if not accepts(kind, type(None)):
        never.append("none")
    if not (accepts(kind, str) or accepts(kind, Path)):
        never += ["text", "empty text"]
    if not accepts(kind, bool):
        never.append("bool")
    if not accepts(kind, float):
        never += ["float", "whole float", "nan", "inf", "minus inf"]
    elif owner is not Box:
        never += ["nan", "minus inf", "inf"]
    for what in never:
        assert refusal(owner, name, NONSENSE[what]) is not None, what


@pytest.mark.parametrize(("owner", "name"), EVERY, ids=NAMES)
def test_a_scalar_of_numpy_counts_as_the_number_that_it_is(owner, name):
    kind = kinds_of(owner)[name]
    if kind in (int, int | None):
        assert refusal(owner, name, np.int64(4)) == refusal(owner, name, 4)
    if kind in (float, float | None):
        assert refusal(owner, name, np.float32(0.5)) == refusal(owner, name, 0.5)
    if kind is bool:
        assert refusal(owner, name, np.True_) == refusal(owner, name, True)


def test_what_means_the_same_is_stored_the_same():
    config = PPOConfig(
        rollout_steps=np.int32(8), learning_rate=np.float64(1e-3), clip=np.float16(0.5)
    )
    assert [type(config.rollout_steps), type(config.learning_rate)] == [int, float]
    assert config == PPOConfig(rollout_steps=8, learning_rate=1e-3, clip=0.5)
    assert MLP(hidden_sizes=[8, np.int64(4)]) == MLP(hidden_sizes=(8, 4))
    assert type(PPOConfig(max_grad_norm=1).max_grad_norm) is float
    assert Box(np.array([3]).tolist()) == Box((3,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PPOConfig(learning_rate="1e-3"),
            "PPOConfig.learning_rate must be a finite number, got '1e-3'.",
        ),
        (
            lambda: MLP(hidden_sizes=64),
            "MLP.hidden_sizes must be a tuple of integers, got 64.",
        ),
        (
            lambda: train_ppo_vectorized(SMALL, iterations="5"),
            "train_ppo_vectorized.iterations must be an integer, got '5'.",
        ),
        (
            lambda: train_ppo_vectorized(SMALL, iterations=1, device="tpux"),
            "train_ppo_vectorized.device must be one of auto, gpu, ",
        ),
        (
            lambda: train_ppo_vectorized("CartPole", iterations=1),
            "train_ppo_vectorized.env must be an environment spec, got 'CartPole'.",
        ),
        (
            lambda: FlightRecorder(hang_timeout_s="5"),
            "FlightRecorder.hang_timeout_s must be a finite number or None, got '5'.",
        ),
        (lambda: PPO(SMALL, seed=10**30), "PPO.seed must fit into 64 bits, got 1000"),
        (lambda: PPO(CartPole), "PPO.env must be an environment spec, got <class "),
        (lambda: MLP(hidden_sizes=(10**9,)), "MLP.hidden_sizes must be at most 65536, got "),
        (lambda: MLP(actor_obs="camera"), "MLP.actor_obs must be a tuple of strings or None, got"),
        (lambda: check_env(SMALL, device="nowhere"), "check_env.device must be a device of this"),
        (lambda: check_env(SMALL, device="meta"), "check_env.device must be a device of this"),
    ],
)
def test_the_form_of_the_error(make, message):
    with pytest.raises(ValueError, match="must") as error:
        make()
    assert str(error.value).startswith(message)


def test_arguments_that_are_not_checked_by_type_pass_as_they_are():
    """A user's own field, of a kind that settings of this package do not have."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(CartPole):
        extra: "list[int]" = None
        other: typing.Any = None
        kind: torch.dtype = torch.float32

    mine = Mine(extra=3, other={1}, num_envs=np.int64(2))
    assert (mine.extra, mine.other, type(mine.num_envs)) == (3, {1}, int)
    with pytest.raises(ValueError, match=r"^Mine.num_envs must be an integer, got 'x'\.$"):
        Mine(num_envs="x")
