"""Single entries are compared and restored, and no other entry is touched."""

import os
import sys
from array import array
from collections import deque
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from esper_lightning.compiling.entries import (
    differences,
    entries_of,
    holds_no_numbers,
    is_users,
    is_users_name,
    restore,
)


@pytest.mark.parametrize(
    ("held", "change"),
    [
        ([1, 2, 3], lambda held: held.pop(0)),
        ([1, 2, 3], lambda held: held.extend((4, 5))),
        (deque([1, 2], maxlen=2), lambda held: held.append(3)),
        ({1, 2}, lambda held: (held.add(3), held.discard(1))),
        ({"a": 1}, lambda held: (held.pop("a"), held.update(b=2))),
        (array("d", [1.0]), lambda held: held.append(2.0)),
        (bytearray(b"12"), lambda held: held.pop()),
        (SimpleNamespace(a=1), lambda held: vars(held).update(a=2, b=3)),
    ],
)
def test_all_entries_that_differ_are_restored(held: Any, change: Any) -> None:
    before, text = entries_of(held), str(held)
    change(held)
    now = entries_of(held)
    names = differences(before, now)
    assert names != []
    restore(held, names, before, now)
    assert str(held) == text


def test_what_another_thread_has_moved_is_left() -> None:
    held = ["a", "of a trace"]
    before, now = {0: "a"}, entries_of(held)
    held.insert(0, "of another thread")
    restore(held, [1], before, now)
    assert held == ["of another thread", "a", "of a trace"]


def test_tensors_without_numbers_are_found_at_any_depth() -> None:
    fake = torch.ones(2, device="meta")
    assert holds_no_numbers({"a": [SimpleNamespace(b=({1: fake},))]})
    assert not holds_no_numbers({"a": [SimpleNamespace(b=({1: torch.ones(2)},))]})


@pytest.mark.parametrize(
    ("name", "place", "expected"),
    [
        ("turtle", "/home/user/turtle.py", True),
        ("turtle", f"{Path(os.__file__).parent}/turtle.py", False),
        ("turtle", "/usr/lib/lib-dynload/turtle.so", False),
        ("optree", "/home/user/optree.py", True),
        ("optree", "/venv/lib/site-packages/optree.py", False),
        ("optree", "/home/user/optree/__init__.py", False),  # such as an editable installation
    ],
)
def test_a_users_file_may_have_the_name_of_a_library(
    name: str, place: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType(name)
    module.__file__ = place
    if place.endswith("__init__.py"):
        module.__path__ = [str(Path(place).parent)]
    monkeypatch.setitem(sys.modules, name, module)
    is_users_name.cache_clear()
    try:
        assert is_users_name(name) == expected
        assert is_users(module) == expected
    finally:
        is_users_name.cache_clear()
