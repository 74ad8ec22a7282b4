"""A single rank communicates with nobody; ``tests/training/test_ranks.py`` has two processes."""

import torch

from esper_lightning.core.ranks import SINGLE_RANK, Ranks, _unpack

TREE = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a": (torch.tensor(True), torch.tensor(7))}


def test_a_single_rank_gets_its_own_tensors_back() -> None:
    assert SINGLE_RANK.sum(TREE) is TREE
    assert Ranks(1).gather(TREE) == [TREE]


def test_saved_states_are_copies_on_the_host() -> None:
    running = {"weight": torch.ones(2), "steps": torch.tensor(3)}
    (saved,) = SINGLE_RANK.collect_states(running)
    running["weight"].zero_()
    running["steps"].add_(1)
    assert saved["weight"].tolist() == [1.0, 1.0]
    assert saved["steps"] == 3


def test_tensors_sent_as_one_vector_regain_their_shapes_and_dtypes() -> None:
    vector = torch.cat([torch.tensor([1.0, 7.0]), torch.arange(1.0, 5.0)]).double()
    tree = _unpack(vector, TREE)  # mappings by sorted key
    assert torch.equal(tree["b"], TREE["b"])
    for got, expected in zip(tree["a"], TREE["a"], strict=True):
        assert torch.equal(got, expected)
        assert got.dtype == expected.dtype
