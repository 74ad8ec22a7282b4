"""Encoders of vectors and of groups: which numbers they see, in which order."""

import pytest
import torch

from esper_lightning.core.spaces import Box
from esper_lightning.policies.encoders import Flat, FlatEncoder, Groups

SPACE = {"camera": Box((2, 2)), "joints": Box((3,)), "extra": Box((1,))}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def flat(groups, hidden_sizes=()):
    return FlatEncoder(SPACE, groups, hidden_sizes, activation="tanh", generator=seeded())


def obs():
    groups = {"extra": torch.ones(2, 1), "joints": torch.full((2, 3), 2.0)}
    return groups | {"camera": torch.full((2, 2, 2), 3.0)}


def test_without_hidden_layers_the_features_are_the_numbers_in_the_order_of_the_space():
    encoder = flat(None)
    assert encoder.features == 8
    assert encoder(obs())[0].tolist() == [3.0] * 4 + [2.0] * 3 + [1.0]


def test_groups_are_seen_in_the_order_that_was_given_and_others_are_not_seen():
    encoder = flat(("extra", "joints"))
    assert encoder(obs())[0].tolist() == [1.0] + [2.0] * 3
    changed = obs() | {"camera": torch.zeros(2, 2, 2)}
    assert torch.equal(encoder(changed), encoder(obs()))


def test_the_number_of_features_is_the_width_of_the_last_layer():
    encoder = flat(None, (5, 7))
    assert encoder.features == 7
    assert encoder(obs()).shape == (2, 7)


@pytest.mark.parametrize("hidden_sizes", [(), (6,)])
def test_an_encoder_of_groups_joins_those_of_each_group(hidden_sizes):
    parts = {"joints": Flat(hidden_sizes=(4,)), "camera": Flat(hidden_sizes=hidden_sizes)}
    space = {name: SPACE[name] for name in ("camera", "joints")}
    encoder = Groups(encoders=parts).build_encoder(space, seeded())
    seen = {name: obs()[name] for name in space}
    features = encoder(seen)
    assert features.shape == (2, encoder.features)
    assert encoder.features == 4 + (hidden_sizes[0] if hidden_sizes else 4)
    moved = encoder(seen | {"joints": torch.zeros(2, 3)})
    assert 0 < int((features != moved)[0].sum()) <= 4  # the features of the other group stay
