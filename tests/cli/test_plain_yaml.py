"""YAML whose meaning is a surprise is refused with its place."""

from enum import IntEnum, StrEnum

import numpy as np
import pytest
import yaml

from esper_lightning.cli.plain_yaml import SurpriseError, dump_plain, refuse_surprises

BOMB = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcde", "bcdef", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", ":2:1: the key 'a' stands here again"),
        ("a: {b: 1, b: 2}", ":1:11: the key 'b' stands here again"),
        ("a.b: 1\na: {c: 2}", ":1:1: the key 'a.b' stands beside 'a'"),
        ('a: {b: "x\\0y"}', r":1:8: the text 'x\x00y' holds a NUL byte"),
        ('? "a\\0"\n: 1', r":1:3: the text 'a\x00' holds a NUL byte"),
        ("a: &x [*x]", "is a part of itself"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        (".".join("a" * 60) + ": 1", "nested more than 50 deep"),
        (BOMB, "more than 100,000 values"),
    ],
    ids=[
        *("twice", "twice below", "dotted", "NUL", "NUL in a key", "circle", "deep"),
        *("deep by dots", "bomb"),
    ],
)
def test_a_surprise_is_refused(text, says):
    with pytest.raises(SurpriseError) as refused:
        refuse_surprises(text)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "a: 1", "a: {b: 1}\nc: {b: 1}", "a: &x [1]\nb: *x", "[{a: 1}, {a: 1}]", "a.b: 1"]
)
def test_plain_yaml_is_accepted(text):
    refuse_surprises(text)


def test_what_is_no_yaml_is_an_error_of_yaml():
    with pytest.raises(yaml.YAMLError):
        refuse_surprises("a: [")


class Unit(StrEnum):
    step = "step"


class Level(IntEnum):
    low = 1


def test_text_and_numbers_of_other_classes_are_written_as_such():
    data = {"a": Unit.step, "b": [Level.low, {"c": np.float64(0.5)}], "d": True, "e": None}
    plain = {"a": "step", "b": [1, {"c": 0.5}], "d": True, "e": None}
    assert yaml.safe_load(dump_plain(data)) == plain


def test_what_yaml_cannot_hold_is_left_out():
    data = {"a": [{"b": f"Unable to serialize instance {object()}", "c": 1}]}
    assert yaml.safe_load(dump_plain(data)) == {"a": [{"c": 1}]}
