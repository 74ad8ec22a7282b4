"""Policies for images: what they see, what they refuse, and how their weights begin."""

import re
from typing import Any

import pytest
import torch

from esper_lightning.core.spaces import Box, Discrete, EnvSpaces, ObsSpace
from esper_lightning.policies import (
    CNN,
    Composed,
    Flat,
    Groups,
    Image,
    Policy,
)

SMALL: dict[str, Any] = {"channels": (4, 8), "kernels": (3, 3), "strides": (2, 1)}
SMALL["hidden_sizes"] = (16,)
BYTES = Box((3, 12, 12), low=0.0, high=255.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(spec: CNN, obs: ObsSpace) -> Policy:
    return spec.build(EnvSpaces(obs=obs, action=Discrete(3)), seeded(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": ()}, "CNN.channels must be one or more sizes of at least 1, got ()."),
        (
            {"kernels": (8, 4)},
            "CNN.kernels must have as many entries as CNN.channels = (32, 64, 64), got (8, 4).",
        ),
        ({"strides": (4, 0, 1)}, "CNN.strides must be one or more sizes of at least 1, got (4, 0,"),
        (
            {"kind": "impala", "strides": (1, 1, 1)},
            "CNN.strides must be None for kind='impala', whose kernels are 3 x 3, got (1, 1, 1).",
        ),
        ({"hidden_sizes": (0,)}, "CNN.hidden_sizes must be widths of at least 1, got (0,)."),
        ({"initial_std": 0.0}, "CNN.initial_std must lie in (0, 100), got 0.0."),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        CNN(**settings)


def test_settings_of_an_encoder_are_refused_in_its_own_name() -> None:
    with pytest.raises(ValueError, match=r"^Image\.channels must be one or more sizes"):
        Image(channels=())


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            Box((3, 16, 16)),
            "CNN.kernels must fit into images of 16 x 16 pixels and 3 channels, got (8, 4, 3). "
            "Convolution 2 sees 3 x 3 pixels. For small images set CNN.kind='impala', or "
            "kernels=(3,), strides=(1,) and channels=(16,).",
        ),
        (
            Box((10, 10, 4)),  # MinAtar
            "CNN.kernels must fit into images of 10 x 10 pixels and 4 channels, got (8, 4, 3). "
            "Convolution 2 sees 1 x 1 pixels. For small images set CNN.kind='impala', or "
            "kernels=(3,), strides=(1,) and channels=(16,).",
        ),
        (
            Box((10, 10, 10)),
            "CNN.channel_order must be first or last for images [10, 10, 10], whose channels no "
            "axis shows, got 'auto'.",
        ),
        (
            Box((7, 7, 12)),
            "CNN.channel_order must be first or last for images [7, 7, 12], whose channels no axis "
            "shows, got 'auto'.",
        ),
        (
            Box((1, 900, 900)),
            "CNN.strides must shrink images of 810000 numbers to at most 65536 features, got (4, 2,"
            " 1), which leave 760384.",
        ),
        (Box((84, 84)), "CNN must see images of three axes, got [84, 84]."),
        ({"a": Box((4,))}, "CNN must see an image of three axes, got [[4]]."),
        (
            {"a": Box((84, 84))},
            "CNN's observation group 'a' must see images of three axes or vectors, got [84, 84].",
        ),
    ],
)
def test_observations_that_the_policy_cannot_see_are_refused(space: ObsSpace, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(CNN(), space)


def test_the_default_is_the_network_for_atari() -> None:
    policy = build(CNN(), Box((4, 84, 84), low=0.0, high=255.0))
    shapes = [
        list(weight.shape) for name, weight in policy.named_parameters() if "bias" not in name
    ]
    convolutions = [[32, 4, 8, 8], [64, 32, 4, 4], [64, 64, 3, 3]]
    assert shapes == [*convolutions, [512, 64 * 7 * 7], [3, 512], [1, 512]]
    assert policy.actor is policy.critic


def test_bytes_are_scaled_and_floats_are_not() -> None:
    """A bright image of bytes is seen as the same image in floats between 0 and 1."""
    of_bytes, of_floats = build(CNN(**SMALL), BYTES), build(CNN(**SMALL), Box((3, 12, 12)))
    image = torch.randint(256, (5, *BYTES.shape), generator=seeded(1)).float()
    torch.testing.assert_close(of_bytes.value(image), of_floats.value(image / 255.0))
    assert not torch.allclose(of_bytes.value(image), of_floats.value(image))


def test_only_images_are_scaled() -> None:
    """A vector between 0 and 255 may be anything, and is seen as it is."""
    space = {"image": BYTES, "vector": Box((2,), 0.0, 255.0)}
    other = {"image": BYTES, "vector": Box((2,))}
    obs = {"image": torch.zeros(3, *BYTES.shape), "vector": torch.full((3, 2), 9.0)}
    values = [build(CNN(**SMALL), each).value(obs) for each in (space, other)]
    torch.testing.assert_close(*values)
    small_numbers = build(CNN(**SMALL, scale_bytes=False), BYTES)
    torch.testing.assert_close(
        small_numbers.value(obs["image"] + 51.0),
        build(CNN(**SMALL), BYTES).value((obs["image"] + 51.0) * 255.0),
    )


@pytest.mark.parametrize("kind", ["nature", "impala"])
def test_channels_may_be_first_or_last(kind: Any) -> None:
    """The same image in both orders has the same value, whoever says the order."""
    settings = SMALL if kind == "nature" else {"kind": "impala", "channels": (4,)}
    image = torch.rand(5, 3, 12, 12, generator=seeded(1))
    value = build(CNN(**settings), Box((3, 12, 12))).value(image)
    last = image.permute(0, 2, 3, 1).contiguous()
    for order in ("auto", "last"):
        policy = build(CNN(**settings, channel_order=order), Box((12, 12, 3)))
        torch.testing.assert_close(policy.value(last), value)
    cube = Box((12, 12, 12))
    first, second = (build(CNN(**settings, channel_order=o), cube) for o in ("first", "last"))
    image = torch.rand(5, 12, 12, 12, generator=seeded(2))
    torch.testing.assert_close(second.value(image.permute(0, 2, 3, 1)), first.value(image))
    assert not torch.allclose(second.value(image), first.value(image))


@pytest.mark.parametrize("shape", [(7, 7, 3), (10, 10, 4), (1, 1, 3), (84, 84, 4)])
def test_impala_sees_images_of_any_size(shape: tuple[int, ...]) -> None:
    policy = build(CNN(kind="impala", channel_order="last"), Box(shape))
    image = torch.rand(2, *shape, generator=seeded(1))
    assert policy.value(image).shape == (2,)
    convolutions = [
        weight for name, weight in policy.named_parameters() if name.endswith("weight")
    ][:-3]
    assert [len(weight) for weight in convolutions] == [16] * 5 + [32] * 10
    with torch.no_grad():  # without its convolutions, a residual block passes its input on
        for name, parameter in policy.named_parameters():
            if ".layers." in name:
                parameter.zero_()
    assert not torch.allclose(policy.value(image), policy.value(torch.zeros_like(image)))


def test_groups_have_encoders_of_their_own() -> None:
    space = {"image": BYTES, "speed": Box((2,)), "secret": Box((3,))}
    encoders = {"speed": Flat(hidden_sizes=(8,)), "image": Image(**SMALL)}
    spec = Composed(
        encoder=Groups(encoders=encoders),
        critic_encoder=Groups(encoders={**encoders, "secret": Flat(hidden_sizes=())}),
        trunk="separate",
    )
    policy = spec.build(EnvSpaces(obs=space, action=Discrete(3)), seeded(0))
    assert (policy.actor.features, policy.critic.features) == (8 + 16, 8 + 16 + 3)
    obs = {name: torch.rand(5, *box.shape, generator=seeded(1)) for name, box in space.items()}
    action = torch.zeros(5, dtype=torch.int64)
    before = policy.evaluate(obs, action, None)
    for name, actor_sees in {"image": True, "speed": True, "secret": False}.items():
        after = policy.evaluate({**obs, name: obs[name] + 90.0}, action, None)
        assert not torch.allclose(after.value, before.value)
        assert torch.equal(after.log_prob, before.log_prob) != actor_sees
    shared = Composed(encoder=Groups(encoders=dict(reversed(encoders.items()))))
    policy = shared.build(EnvSpaces(obs=space, action=Discrete(3)), seeded(0))
    assert policy.actor is policy.critic
    same = Composed(encoder=Groups(encoders=encoders))
    policies = [
        each.build(EnvSpaces(obs=space, action=Discrete(3)), seeded(0)) for each in (shared, same)
    ]
    assert torch.equal(*(each.value(obs) for each in policies))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"encoder": Groups(encoders={"x": Flat()})},
            "Groups.encoders must name groups of the observation (a), got 'x'.",
        ),
        (
            {"encoder": Flat(), "critic_encoder": Flat()},
            "Composed.critic_encoder must be None for a shared trunk, got",
        ),
        (
            {"encoder": Flat(), "encoder_args": {"width": 3}},
            "Composed.encoder_args must be empty for encoder specs, which have settings of their "
            "own, got {'width': 3}.",
        ),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(settings: dict[str, Any], message: str) -> None:
    spaces = EnvSpaces(obs={"a": Box((2,))}, action=Discrete(3))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Composed(**settings).build(spaces, seeded(0))


def test_a_function_is_stored_by_its_import_path() -> None:
    spec = Composed.of(linear, hidden_sizes=())
    assert spec == Composed(encoder=f"{__name__}:linear")
    rule = r"^Composed\.encoder must be a function or class that can be imported by its name, got"
    with pytest.raises(ValueError, match=rule):
        Composed.of(lambda space: torch.nn.Linear(space.size, 4))
    assert spec.build(EnvSpaces(obs=Box((2,)), action=Discrete(3)), seeded(0)).actor.features == 4


def linear(space: Box) -> torch.nn.Module:
    return torch.nn.Linear(space.size, 4)


def test_groups_join_behind_the_convolutions() -> None:
    space = {"speed": Box(()), "left": BYTES, "right": Box((1, 9, 9))}
    policy = build(CNN(**SMALL, trunk="separate"), space)
    obs = {name: torch.rand(5, *box.shape, generator=seeded(1)) for name, box in space.items()}
    value = policy.value(obs)
    assert torch.equal(policy.value(dict(reversed(obs.items()))), value)
    for name in space:
        assert not torch.allclose(policy.value({**obs, name: obs[name] + 100.0}), value)
    action = torch.zeros(5, dtype=torch.int64)
    sum(result.sum() for result in policy.evaluate(obs, action, None)).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_first_weights_are_orthogonal_and_depend_on_the_generator_alone() -> None:
    before = torch.get_rng_state()
    spaces = EnvSpaces(obs=BYTES, action=Discrete(3))
    first, again, other = (CNN(**SMALL).build(spaces, seeded(s)).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if name.endswith("weight"):
            assert not torch.equal(value, other[name])
        else:
            assert not value.any()
    rows = first["actor.convolutions.group_obs.0.weight"].flatten(1)
    torch.testing.assert_close(rows @ rows.T, 2.0 * torch.eye(4))
