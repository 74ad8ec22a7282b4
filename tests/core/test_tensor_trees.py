"""Tensors of a tree are found and replaced in the same order, and none is skipped silently."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from esper_lightning.core.tensor_trees import (
    kind,
    leaves,
    map_obs,
    map_tree,
    named_tensors,
    rebuild,
)


class Pair(NamedTuple):
    first: object
    second: object


def test_rebuilding_keeps_the_shape_of_the_tree() -> None:
    tree = Pair({"b": torch.ones(1), "a": [torch.zeros(2), None, 3]}, (torch.ones(3), "name"))
    again = rebuild(tree, leaves(tree))
    assert isinstance(again, Pair)
    assert list(again.first) == ["b", "a"]
    assert again.first["a"][1:] == [None, 3]
    assert again.second[1] == "name"
    assert [leaf.numel() for leaf in leaves(again)] == [2, 1, 3]  # by sorted key


def test_equal_mappings_agree_whatever_their_order() -> None:
    one = {"a": torch.zeros(1), "b": torch.ones(1)}
    other = {"b": torch.ones(1), "a": torch.zeros(1)}
    assert [a.item() == b.item() for a, b in zip(leaves(one), leaves(other), strict=True)] == [
        True,
        True,
    ]
    doubled = map_tree(lambda leaf: 2 * leaf, other)
    assert (doubled["a"].item(), doubled["b"].item()) == (0.0, 2.0)


def test_a_value_that_is_no_tree_is_refused() -> None:
    @dataclass
    class Box:
        value: torch.Tensor

    with pytest.raises(ValueError, match="tuples, lists and mappings, got 'Box'"):
        leaves((Box(torch.ones(1)),))


def test_tensors_are_named_by_their_whole_path() -> None:
    tree = {"layers": [{"weight": torch.zeros(1)}, (torch.ones(1), None)], 7: torch.ones(2), "n": 3}
    named = [(name, leaf.numel()) for name, leaf in named_tensors(tree)]
    assert named == [("layers.0.weight", 1), ("layers.1.0", 1), ("7", 2)]
    assert next(named_tensors(tree, "state"))[0] == "state.layers.0.weight"
    assert [name for name, _ in named_tensors(torch.ones(1))] == [""]


def test_trees_of_one_kind_differ_in_the_numbers_of_their_tensors_alone() -> None:
    tree = ({"a": torch.zeros(2), "b": torch.ones(2)}, [1.0, None, "x"])
    same = ({"a": torch.ones(2), "b": torch.zeros(2)}, [1.0, None, "x"])
    assert kind(tree) == kind(same)
    assert hash(kind(tree)) == hash(kind(same))
    assert kind(float("nan")) == kind(float("nan"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2).double()),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        ({"a": torch.zeros(1), "b": torch.ones(1)}, {"b": torch.zeros(1), "a": torch.ones(1)}),
        ((torch.zeros(1), 1.0), (torch.zeros(1), 2.0)),
        ((torch.zeros(1), 1), (torch.zeros(1), True)),
        ((torch.zeros(1), 1), (torch.zeros(1), 1.0)),
        ((torch.zeros(1), 0.0), (torch.zeros(1), -0.0)),
        ((torch.zeros(1), None), (None, torch.zeros(1))),
        ((torch.zeros(1), "a"), (torch.zeros(1), "b")),
        ([torch.zeros(1)], (torch.zeros(1),)),
        ((torch.zeros(1), (None, None)), (torch.zeros(1), (None,), None)),
        (Pair(torch.zeros(1), None), (torch.zeros(1), None)),
    ],
)
def test_trees_that_differ_have_different_kinds(one: Any, other: Any) -> None:
    assert kind(one) != kind(other)


def test_a_value_that_is_no_tree_has_no_kind() -> None:
    with pytest.raises(ValueError, match="got 'set'"):
        kind((torch.zeros(1), {1}))


def test_an_observation_without_groups_is_mapped_as_one_tensor() -> None:
    one, other = torch.ones(2), torch.full((2,), 3.0)
    assert map_obs(torch.sub, one, other).tolist() == [-2.0, -2.0]


def test_each_group_is_mapped_with_the_same_group_of_other_observations() -> None:
    one = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    other = {"b": torch.tensor(20.0), "a": torch.tensor(10.0)}  # in another order
    got = map_obs(torch.sub, one, other)
    assert {name: value.item() for name, value in got.items()} == {"a": -9.0, "b": -18.0}
