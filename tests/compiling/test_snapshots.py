"""What is compared at every call is noticed when it changes; what would take long is refused."""

import copy
import re
from typing import Any

import numpy as np
import pytest

from esper_lightning.compiling.holders import ImpureError
from esper_lightning.compiling.snapshots import Snapshot, Snapshots

VALUES: list[tuple[Any, Any]] = [
    ({"a": [1.0, {2}]}, lambda held: held["a"][1].add(3)),
    ({"a": [1.0]}, lambda held: held.update(b=2.0)),
    ([], lambda held: held.append(1.0)),
    (bytearray(b"1"), lambda held: held.append(1)),
    (np.zeros((2, 3)), lambda held: held.resize((3, 2), refcheck=False)),
    (np.array([float("nan"), 0.0]), lambda held: np.negative(held, out=held)),
]


@pytest.mark.parametrize(("value", "change"), VALUES)
def test_contents_of_containers_are_compared(value: Any, change: Any) -> None:
    snapshots = Snapshots([Snapshot({"key": value}, ["key"], str)])
    assert snapshots.changed() is None
    change(value)
    assert snapshots.changed() == "key"


def test_equal_values_are_no_change_and_what_appears_is_one() -> None:
    held = {"a": float("2.5"), "b": [1.0]}
    snapshots = Snapshots([Snapshot(held, ["a", "b"], str, absent=["c"])])
    held["a"], held["b"], held["other"] = float("2.5"), [1.0], 1
    assert snapshots.changed() is None
    held["b"].append(2.0)  # of the new list
    assert snapshots.changed() == "b"
    held["b"].pop()
    held["c"] = 1
    assert snapshots.changed() == "c"
    whole = Snapshots([Snapshot(held, [*held], str, is_whole=True)])
    held["__new__"] = 1
    assert whole.changed() is None
    held["new"] = 1
    assert whole.changed() == "new"
    del held["a"]
    assert snapshots.changed() is not None


class Level(float):
    """A number of a user's class, with an attribute."""

    bonus = 1.0


class Levels(list[float]):
    """A list of a user's class."""


def level(bonus: float) -> Level:
    """A level that is equal to any other."""
    made = Level(1.0)
    made.bonus = bonus
    return made


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (0.0, -0.0),
        (complex(0.0, 0.0), complex(0.0, -0.0)),
        ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}),
        ({1: 1.0}, {True: 1.0}),
        ({1}, frozenset({1})),
        (level(1.0), level(2.0)),
        (1.0, level(1.0)),
        ([1.0], Levels([1.0])),
    ],
)
def test_what_is_equal_and_yet_another_is_a_change(value: Any, other: Any) -> None:
    assert value == other
    held = {"key": value}
    snapshots = Snapshots([Snapshot(held, ["key"], str)])
    held["key"] = copy.deepcopy(value)
    assert snapshots.changed() is None
    held["key"] = other
    assert snapshots.changed() == "key"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.ones(2**18), "key: changes of an array of more than 1048576 bytes"),
        (np.array([1.0, None]), "key: changes of an array of objects"),
        ([1.0] * 20_001, "key: more than 20000 elements"),
    ],
)
def test_what_would_take_long_to_compare_is_refused(value: Any, why: str) -> None:
    with pytest.raises(ImpureError, match=re.escape(why)):
        Snapshots([Snapshot({"key": value}, ["key"], str)])


def test_an_array_that_cannot_be_written_to_may_be_large() -> None:
    value = np.ones(2**18)
    value.flags.writeable = False
    snapshots = Snapshots([Snapshot({"key": value}, ["key"], str)])
    assert snapshots.changed() is None
    value.flags.writeable = True
    assert snapshots.changed() == "key"
