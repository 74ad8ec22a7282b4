"""The source files of a user's program are known by their digests."""

import importlib
import sys
from types import ModuleType

import pytest

from esper_lightning.forensics.fingerprint import differences, fingerprint_of_process
from esper_lightning.forensics.sources import digests_of_sources


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of a user's that is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "mine_of_a_user.py"
    path.write_text("VALUE = 1\n")
    importlib.import_module("mine_of_a_user")
    yield path
    del sys.modules["mine_of_a_user"]


def test_a_changed_file_that_no_repository_holds_is_named(mine):
    before = fingerprint_of_process(None)
    assert differences(before, fingerprint_of_process(None)) == ()
    mine.write_text("VALUE = 2\n")
    assert differences(before, fingerprint_of_process(None)) == ("mine_of_a_user.py changed",)


def test_installed_files_and_those_of_this_package_are_left_out(mine):
    found = digests_of_sources()
    assert "mine_of_a_user.py" in found
    assert not any("site-packages" in path or "/esper_lightning/" in path for path in found)
    assert not any(path.endswith("/json/__init__.py") for path in found)


def test_a_file_that_is_gone_or_large_is_left_out(mine):
    mine.write_bytes(b"#" * (1 << 20) + b"\n")
    assert "mine_of_a_user.py" not in digests_of_sources()
    mine.unlink()
    assert "mine_of_a_user.py" not in digests_of_sources()


def test_files_near_the_user_count_before_those_of_many_others(mine, monkeypatch, tmp_path_factory):
    far = tmp_path_factory.mktemp("a_far")  # before the user's by name
    for number in range(201):
        path = far / f"far_{number}.py"
        path.write_text("VALUE = 1\n")
        module = ModuleType(path.stem)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, path.stem, module)
    found = digests_of_sources()
    assert 150 < len(found) <= 200
    assert next(iter(found)) == "mine_of_a_user.py"
