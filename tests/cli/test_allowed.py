"""The type of a setting becomes a rule in the words of a user."""

from pathlib import Path
from typing import Literal

import pytest

from esper_lightning.cli.allowed import choices_of, listed, literals_of, rule_of
from esper_lightning.envs import EnvSpec


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (int, "an integer"),
        (int | None, "an integer, or null"),
        (Literal["a", "b"] | float, "one of a, b, or a number"),
        (list[int], "a list of integers"),
        (tuple[str, ...] | None, "a list of texts, or null"),
        (EnvSpec | None, "the name of a class of EnvSpec, or null"),
        (Path | None, "a path, or null"),
        (object(), "of another type"),
    ],
    ids=range(8),
)
def test_a_type_is_a_rule(kind, rule):
    assert rule_of(kind) == rule


def test_single_values_are_those_of_all_members():
    assert literals_of(Literal["a", 1] | None | Literal["c"]) == ["a", 1, "c"]


def test_classes_that_a_setting_may_name_are_public_and_no_bases():
    names = choices_of(EnvSpec)
    assert {"CartPole", "Pendulum", "Gymnasium"} <= set(names)
    assert "EnvSpec" not in names


def test_a_long_list_of_names_is_cut_between_two_names():
    assert listed(["a", "b"]) == "a, b"
    text = listed([f"name_{number}" for number in range(100)])
    assert text.endswith(", ...")
    assert all(name.startswith("name_") for name in text.split(", ")[:-1])
