"""Functions over observations with and without groups."""

import torch

from esper_lightning.core.types import map_obs


def test_an_observation_without_groups_is_mapped_as_one_tensor() -> None:
    one, other = torch.ones(2), torch.full((2,), 3.0)
    assert map_obs(torch.sub, one, other).tolist() == [-2.0, -2.0]


def test_each_group_is_mapped_with_the_same_group_of_other_observations() -> None:
    one = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    other = {"b": torch.tensor(20.0), "a": torch.tensor(10.0)}  # in another order
    got = map_obs(torch.sub, one, other)
    assert {name: value.item() for name, value in got.items()} == {"a": -9.0, "b": -18.0}
