"""What annotations say about the plain data of settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from esper_lightning.training.annotations import (
    annotations,
    dataclass_of,
    entry_kinds,
    item_kinds,
    named_by_text,
)
from tests.training.test_specs import Gait, Limits, Rough


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Gait | None, Gait),
        (Path, Path),
        (str | Path, None),
        (Gait | Path, None),
        (list[Gait], None),
        (Any, None),
    ],
    ids=str,
)
def test_text_stands_for_an_enum_or_a_path_where_it_can_mean_nothing_else(kind, expected):
    assert named_by_text(kind) is expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Limits, Limits), (Limits | None, Limits), (Limits | Rough, None), (object, None)],
    ids=str,
)
def test_fields_mean_a_dataclass_where_the_annotation_names_one_alone(kind, expected):
    assert dataclass_of(kind) is expected


def test_kinds_of_entries_and_items():
    assert entry_kinds(Mapping[Gait, Path]) == entry_kinds(dict[Gait, Path] | None) == (Gait, Path)
    assert entry_kinds(tuple[Gait, Path]) == entry_kinds(dict) == (object, object)
    assert item_kinds(tuple[Gait, ...], 2) == [Gait, Gait]
    assert item_kinds(tuple[Gait, Path], 2) == [Gait, Path]
    assert item_kinds(dict[str, Path] | list[Gait], 1) == [Gait]
    assert item_kinds(list, 2) == [object, object]


class Unknown:
    field: "NotThere"


def test_a_name_that_is_not_known_makes_no_annotations():
    assert annotations(Unknown) == {}
    assert annotations(Limits)["gait"] is Gait
