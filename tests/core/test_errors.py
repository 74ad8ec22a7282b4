"""Errors about what a user wrote have one form."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from esper_lightning.core.errors import (
    at_least,
    check_arguments,
    check_fields,
    missing_members,
    one_of,
    positive,
    require,
    require_int,
    require_members,
    require_name,
)


def test_a_value_that_obeys_the_rule_passes() -> None:
    require(True, "Owner.field", "rule", 0)


@pytest.mark.parametrize(
    ("got", "hint", "message"),
    [
        (2.0, "", "PPOConfig.clip must lie in (0, 1), got 2.0."),
        ("a", "Try 0.2.", "PPOConfig.clip must lie in (0, 1), got 'a'. Try 0.2."),
        (None, "", "PPOConfig.clip must lie in (0, 1), got None."),
    ],
)
def test_the_error_names_field_rule_value_and_hint(got: object, hint: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require(False, "PPOConfig.clip", "lie in (0, 1)", got, hint)


@pytest.mark.parametrize("value", [1, 2, 10**30])
def test_integers_that_are_great_enough_pass(value: int) -> None:
    require_int("Owner.field", value, minimum=1)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_a_value_that_is_no_integer_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"must be an integer, got {value!r}.")):
        require_int("Owner.field", value, minimum=0)


def test_a_number_at_its_limit_passes_and_so_does_a_setting_that_is_off() -> None:
    for value in (1, 1.0, 1.5, None):
        at_least("Owner.field", value, 1)
    for value in (1, 5e-324, None):
        positive("Owner.field", value)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0, "at least 1"),
        (0.9, "at least 1"),
        (-math.inf, "a finite number"),
        (math.inf, "a finite number"),
        (math.nan, "a finite number"),
    ],
)
def test_a_number_below_its_least_value_is_refused(value: int | float, rule: str) -> None:
    message = rf"^Owner\.field must be {rule}, got {value}\. None switches it off\.$"
    with pytest.raises(ValueError, match=message):
        at_least("Owner.field", value, 1, "None switches it off.")


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0, "positive"),
        (-1.0, "positive"),
        (math.inf, "a finite number"),
        (math.nan, "a finite number"),
    ],
)
def test_a_number_that_is_not_positive_is_refused(value: int | float, rule: str) -> None:
    message = rf"^Owner\.field must be {rule}, got {value}\. None switches it off\.$"
    with pytest.raises(ValueError, match=message):
        positive("Owner.field", value, "None switches it off.")


def test_a_value_that_is_no_choice_is_refused_with_all_choices() -> None:
    choices = {"torch": 1, "onnx": 2}
    one_of("--format", "onnx", choices)
    with pytest.raises(ValueError, match=r"^--format must be one of torch, onnx, got 3\. Hint\.$"):
        one_of("--format", 3, choices, "Hint.")


def test_a_name_is_neither_empty_nor_holds_a_nul_byte() -> None:
    for value in (None, "x", " x", Path()):
        require_name("Owner.field", value, "a file")
    for value in ("", "  ", "\0", Path("a\0b")):
        with pytest.raises(ValueError, match=r"^Owner.field must name a file, got "):
            require_name("Owner.field", value, "a file")


def test_an_integer_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Owner\.field must be at least 1, got 0\.$"):
        require_int("Owner.field", 0, minimum=1)


@dataclass(frozen=True)
class Sizes:
    """Settings with a mapping of numbers by name."""

    by_name: dict[str, int]

    def __post_init__(self) -> None:
        check_fields(self)


def test_a_mapping_whose_entries_fit_is_kept() -> None:
    given = {"a": 1, "b": 2}
    assert Sizes(given).by_name is given


@pytest.mark.parametrize("given", [{"a": 1, "b": 2.5}, {"a": True}, {"a": "1"}, {3: 1}, [("a", 1)]])
def test_a_mapping_of_which_one_entry_has_another_type_is_refused(given: object) -> None:
    with pytest.raises(
        ValueError, match=r"^Sizes\.by_name must be .*, got " + re.escape(repr(given))
    ):
        Sizes(given)


class Interface(Protocol):
    limit: int

    def begin(self) -> int: ...

    def end(self) -> int: ...


def test_members_without_code_of_their_own_are_named_and_others_are_not() -> None:
    class Half(Interface):
        def begin(self) -> int:
            return 1

    class Duck:
        limit = 3
        begin = end = staticmethod(lambda: 0)

    members = ("limit", "begin", "end")
    assert missing_members(Half(), members) == ["limit", "end"]
    require_members("duck", Duck(), members, "be an Interface")
    message = "^duck must be an Interface, got Half without limit, end.$"
    with pytest.raises(ValueError, match=message):
        require_members("duck", Half(), members, "be an Interface")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"^test_.*call\(\): missing a required (keyword-only )?argument: 'count'$"),
        ({"count": 1, "size": 2}, r"^test_.*call\(\): got an unexpected keyword argument 'size'$"),
    ],
)
def test_an_argument_that_is_missing_or_unknown_is_an_error_of_its_function(
    arguments: dict[str, int], message: str
) -> None:
    @check_arguments
    def call(*, count: int) -> int:
        return count

    with pytest.raises(TypeError, match=message):
        call(**arguments)
    assert call(count=3) == 3
