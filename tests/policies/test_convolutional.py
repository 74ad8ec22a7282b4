"""Policies for images: what they see, what they refuse, and how their weights begin."""

import re
from typing import Any

import pytest
import torch

from esper_lightning.core.spaces import Box, Discrete, EnvSpaces, ObsSpace
from esper_lightning.policies import CNN, Image, Policy

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
            "CNN.kernels must fit into images [3, 16, 16], which are [C, H, W], got (8, 4, 3). "
            "Convolution 2 sees 3 x 3 pixels.",
        ),
        (
            Box((84, 84, 3)),
            "CNN.kernels must fit into images [84, 84, 3], which are [C, H, W], got (8, 4, 3). "
            "Convolution 1 sees 84 x 3 pixels.",
        ),
        (
            Box((1, 900, 900)),
            "CNN.strides must shrink images [1, 900, 900] to at most 65536 features, got (4, 2, 1),"
            " which leave 760384.",
        ),
        (Box((84, 84)), "CNN must see images [C, H, W], got [84, 84]."),
        ({"a": Box((4,))}, "CNN must see an image [C, H, W], got [[4]]."),
        (
            {"a": Box((84, 84))},
            "CNN's observation group 'a' must see images [C, H, W] or vectors, got [84, 84].",
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
