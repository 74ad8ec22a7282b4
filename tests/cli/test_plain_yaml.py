"""YAML whose meaning is a surprise is refused with its place."""

import pytest
import yaml

from esper_lightning.cli.plain_yaml import SurpriseError, refuse_surprises

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
        ("a: &x [*x]", "is a part of itself"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        (".".join("a" * 60) + ": 1", "nested more than 50 deep"),
        (BOMB, "more than 100,000 values"),
    ],
    ids=["twice", "twice below", "dotted", "circle", "deep", "deep by dots", "bomb"],
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
