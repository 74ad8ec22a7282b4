"""Functions over observations that may be groups."""

import torch

from esper_lightning.core.types import map_obs


def test_a_tensor_is_mapped_as_it_is() -> None:
    one, other = torch.ones(2), torch.full((2,), 3.0)
    assert map_obs(torch.sub, one, other).tolist() == [-2.0, -2.0]


def test_groups_are_mapped_with_the_same_group_of_the_others() -> None:
    one = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    other = {"b": torch.tensor(20.0), "a": torch.tensor(10.0)}  # in another order
    got = map_obs(torch.sub, one, other)
    assert {name: value.item() for name, value in got.items()} == {"a": -9.0, "b": -18.0}
