"""A record reads what fits the type of each field, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from esper_lightning.forensics.records import EpochSeconds, Record, earlier_key, stored_as


@dataclass(frozen=True, kw_only=True)
class Inner(Record):
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outer(Record):
    name: str | None = None
    share: float | None = None
    since_s: EpochSeconds | None = None
    is_whole: bool = False
    sizes: tuple[int, ...] = ()
    inner: Inner | None = None
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    class_name: str | None = field(default=None, metadata=stored_as("class"))
    renamed: int | None = field(default=None, metadata=earlier_key("before"))


def test_a_record_comes_back_as_it_was():
    whole = Outer(
        name="a",
        share=0.5,
        since_s=3.0,
        is_whole=True,
        sizes=(1, 2),
        inner=Inner(size=1),
        by_name={"x": Inner(size=2)},
        class_name="C",
        renamed=4,
        unknown={"later": None},
    )
    assert Outer.from_dict(whole.to_dict()) == whole
    assert whole.to_dict()["class"] == "C"


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("name", 3),
        ("share", True),
        ("share", "0.5"),
        ("since_s", -1.0),
        ("since_s", 1e300),
        ("is_whole", 1),
        ("sizes", {"a": 1}),
        ("inner", [1]),
        ("by_name", [1]),
    ],
)
def test_a_value_of_another_type_counts_as_absent(key, wrong):
    assert getattr(Outer.from_dict({key: wrong}), key) == getattr(Outer(), key)


def test_of_a_container_the_entries_that_fit_are_read():
    found = Outer.from_dict({"sizes": [1, "2", None, 3], "by_name": {"x": {"size": 1}, "y": 2}})
    assert found.sizes == (1, 3)
    assert found.by_name == {"x": Inner(size=1)}


def test_an_earlier_key_is_read_where_there_is_no_later_one():
    assert Outer.from_dict({"before": 1}).renamed == 1
    assert Outer.from_dict({"before": 1, "renamed": 2}).renamed == 2
