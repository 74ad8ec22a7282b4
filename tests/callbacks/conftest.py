"""A file system in memory, in the place of one of another machine."""

import fsspec
import pytest


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """The empty file system of ``memory://`` addresses; local paths begin in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    there = fsspec.filesystem("memory")
    there.store.clear()
    yield there
    there.store.clear()
