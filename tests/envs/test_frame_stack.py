"""Stacks of frames hold what was seen, and never a frame of another episode."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

from esper_lightning import check_env
from esper_lightning.core.spaces import Box
from esper_lightning.envs import CartPole, Custom, FrameStack, Gymnasium
from esper_lightning.envs.base import EnvSpec, is_functional, reseed_env, spec_name
from esper_lightning.envs.frame_stack import FrameStackEnv
from tests.envs.adapters.simulators import Counter
from tests.envs.pictures import Pictures

CPU = torch.device("cpu")
FIVE = Custom(make="tests.envs.adapters.simulators:make_torch_five", shared=False, num_envs=4)


@pytest.fixture(autouse=True)
def _registered() -> Any:
    gymnasium.register("EsperFrames-v0", Counter)
    yield
    gymnasium.registry.pop("EsperFrames-v0")


INNER: dict[str, EnvSpec] = {
    "vector, functional": CartPole(num_envs=4, time_limit=7),
    "image, functional": Pictures(shape=(5, 4, 2), last_places=10),
    "groups, functional": Pictures(shape=(3, 4), grouped=True),
    "image in numpy": Gymnasium(id="EsperFrames-v0", num_envs=3, kwargs={"kind": "image"}),
    "masks in numpy": Gymnasium(id="EsperFrames-v0", num_envs=3, kwargs={"kind": "dict"}),
    "simulator of tensors": FIVE,
}
each_env = pytest.mark.parametrize("env", INNER.values(), ids=INNER)


@each_env
def test_stacked_environments_keep_the_contract(env: EnvSpec) -> None:
    spec = FrameStack(env=env, frames=3)
    check_env(spec, steps=30)
    assert is_functional(spec.build(CPU, 0)) == is_functional(env.build(CPU, 0))


def groups_of(obs: Any) -> dict[str, Tensor]:
    return obs if isinstance(obs, dict) else {"": obs}


@each_env
@pytest.mark.parametrize("frames", [1, 3])
def test_a_stack_is_the_latest_frames_of_its_episode(env: EnvSpec, frames: int) -> None:
    """Compared with the same environments without a stack, whose frames are kept in lists."""
    spec = FrameStack(env=env, frames=frames)
    stacked, plain = spec.build(CPU, 1), env.build(CPU, 1)
    (obs, _), (frame, _) = stacked.reset(), plain.reset()
    history = [
        [{n: g[b] for n, g in groups_of(frame).items()}] * frames for b in range(env.num_envs)
    ]

    def expect(obs: Any, histories: list[list[dict[str, Tensor]]]) -> None:
        for name, group in groups_of(obs).items():
            for b, past in enumerate(histories):
                seen = [each[name] for each in past[-frames:]]
                if seen[0].dim() == 2:
                    expected = torch.stack(seen)
                else:
                    axis = 2 if seen[0].dim() == 3 and seen[0].shape[2] < 3 else 0
                    expected = torch.cat(seen, axis)
                assert torch.equal(group[b].float(), expected.float())

    expect(obs, history)
    generator, ends = torch.Generator().manual_seed(0), 0
    action_space = env.spaces().action
    for _ in range(25):
        if isinstance(action_space, Box):
            action = torch.rand(env.num_envs, *action_space.shape, generator=generator)
        else:
            action = torch.zeros(env.num_envs, dtype=torch.int64)
        mine, theirs = stacked.step(action), plain.step(action)
        assert torch.equal(mine.terminated, theirs.terminated)
        assert torch.equal(mine.truncated, theirs.truncated)
        ended = theirs.terminated | theirs.truncated
        ends += int(ended.sum())
        reached = []
        for b in range(env.num_envs):
            row = {n: g[b].clone() for n, g in groups_of(theirs.reached_obs).items()}
            history[b] = [*history[b], row]
            reached.append(history[b])
            if ended[b]:
                row = {n: g[b].clone() for n, g in groups_of(theirs.obs).items()}
                history[b] = [row] * frames
        expect(mine.reached_obs, reached)
        expect(mine.obs, history)
    assert ends > 0


def test_only_named_groups_are_stacked() -> None:
    env = Pictures(shape=(3, 4), grouped=True)
    spec = FrameStack(env=env, frames=2, groups=("image",))
    boxes = spec.spaces().obs
    assert isinstance(boxes, dict)
    assert {name: box.shape for name, box in boxes.items()} == {"image": (2, 3, 4), "vector": (2,)}
    check_env(spec, steps=20)
    rule = "FrameStack.groups must name groups of the observation (image, vector), got 'imago'."
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}"):
        FrameStack(env=env, groups=("imago",)).spaces()


@pytest.mark.parametrize(
    ("shape", "order", "expected"),
    [
        ((84, 84), "auto", (4, 84, 84)),
        ((3, 84, 84), "auto", (12, 84, 84)),
        ((210, 160, 3), "auto", (210, 160, 12)),
        ((7, 7, 7), "last", (7, 7, 28)),
        ((7, 7, 7), "first", (28, 7, 7)),
        ((5,), "auto", (20,)),
        ((), "auto", (4,)),
    ],
)
def test_frames_are_joined_along_their_channels(shape: Any, order: Any, expected: Any) -> None:
    spec = FrameStack(env=Pictures(shape=shape), channel_order=order)
    box = spec.spaces().obs
    assert isinstance(box, Box)
    assert (box.shape, box.dtype, box.high) == (expected, "uint8", 255.0)


def test_images_without_visible_channels_and_settings_that_cannot_work_are_refused() -> None:
    rule = "FrameStack.channel_order must be first or last for images [7, 7, 7], whose channels no"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}"):
        FrameStack(env=Pictures(shape=(7, 7, 7))).spaces()
    with pytest.raises(ValueError, match=r"^FrameStack\.frames must be at least 1"):
        FrameStack(env=CartPole(), frames=0)


def test_all_else_is_that_of_the_environments_within() -> None:
    inner = Gymnasium(id="EsperFrames-v0", num_envs=3)
    spec = FrameStack(env=inner)
    assert spec_name(spec) == "EsperFrames-v0"
    assert (spec.num_envs, spec.shared) == (3, False)
    assert FrameStack(env=dataclasses.replace(FIVE, shared=True)).shared
    assert spec.evaluation_spec(2).env == inner.evaluation_spec(2)
    assert FrameStack(env=CartPole(num_envs=4)).evaluation_spec(9).env == CartPole(num_envs=9)
    env = spec.build(CPU, 0)
    first, _ = env.reset()
    assert reseed_env(env, 0)
    assert torch.equal(env.reset()[0], first)
    assert env.state_dict() is None
    env.close()
    assert FrameStack(env=CartPole()).build(CPU, 0).metrics() == {}
    members = ("num_envs", "spaces", "reset", "step", "state_dict", "load_state_dict")
    inner = CartPole().build(CPU, 0)
    plain = SimpleNamespace(**{name: getattr(inner, name) for name in members})
    assert not hasattr(FrameStackEnv(FrameStack(env=CartPole()), plain, CPU), "reseed")
