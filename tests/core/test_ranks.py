"""A single rank communicates with nobody; ``tests/training/test_ranks.py`` has two processes."""

import contextlib
from collections.abc import Generator
from typing import Any

import pytest
import torch

from esper_lightning.core import ranks
from esper_lightning.core.ranks import SINGLE_RANK, Ranks, _unpack, noting_collectives

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


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_states_do_not_travel_through_the_memory_of_gpus(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    groups, made = [], []

    def gather(mine: Any, states: list[Any] | None, group: Any = None) -> None:
        groups.append(group)
        assert states is not None
        states[:] = [mine, mine]

    def new_group(backend: str) -> str:
        made.append(backend)
        return f"group of {backend}"

    monkeypatch.setattr(ranks.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks.dist, "new_group", new_group)
    monkeypatch.setattr(ranks.dist, "gather_object", gather)
    both = Ranks(2)
    for _ in range(2):
        assert both.collect_states({"steps": torch.tensor(3)})[1]["steps"] == 3
    assert made == (["gloo"] if backend == "nccl" else [])  # once in a run
    assert groups == 2 * (["group of gloo"] if backend == "nccl" else [None])


def test_each_collective_is_noted_until_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def note(name: str) -> Generator[None]:
        seen.append(f"begins {name}")
        yield
        seen.append("ends")

    monkeypatch.setattr(ranks.dist, "all_reduce", lambda total: seen.append("runs"))
    end = noting_collectives(note)
    Ranks(2).sum(torch.ones(3))
    assert seen == ["begins all_reduce of 3 float32", "runs", "ends"]
    end()
    end()
    Ranks(2).sum(torch.ones(3))
    assert seen[3:] == ["runs"]


def test_tensors_sent_as_one_vector_regain_their_shapes_and_dtypes() -> None:
    vector = torch.cat([torch.tensor([1.0, 7.0]), torch.arange(1.0, 5.0)]).double()
    tree = _unpack(vector, TREE)  # mappings by sorted key
    assert torch.equal(tree["b"], TREE["b"])
    for got, expected in zip(tree["a"], TREE["a"], strict=True):
        assert torch.equal(got, expected)
        assert got.dtype == expected.dtype
