"""The record of a directory's owner is read whatever is in the file."""

import os
import shutil
from pathlib import Path

import pytest

from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.owner_record import (
    holds_a_run,
    is_copied,
    open_record,
    read_locked,
    read_owner,
    read_record,
    use_of,
    write_locked,
)


@pytest.fixture
def lock(tmp_path):
    descriptor = open_record(RunLayout(tmp_path).owner)
    yield descriptor
    os.close(descriptor)


def test_what_was_written_is_read(tmp_path, lock):
    write_locked(lock, {"pid": 3, "claimed_s": 1.5})
    assert read_owner(tmp_path).items() >= {"pid": 3, "claimed_s": 1.5}.items()
    assert read_locked(lock) == read_owner(tmp_path)
    write_locked(lock, {"pid": None})  # shorter, and released
    assert read_owner(tmp_path) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[3]", b"\xff" * 9, b"[" * 9000])
def test_a_damaged_record_names_nobody(tmp_path, lock, content):
    os.pwrite(lock, content, 0)
    assert read_owner(tmp_path) == read_locked(lock) == {}
    assert not holds_a_run(tmp_path)


def test_a_copy_of_the_file_is_known(tmp_path, lock):
    write_locked(lock, {"pid": 3})
    assert not is_copied(lock)
    copy = shutil.copy(RunLayout(tmp_path).owner, tmp_path / "copy")
    with Path(copy).open("rb") as file:
        assert is_copied(file.fileno())


@pytest.mark.parametrize(("use", "found"), [("logger", "logger"), ("run", "run"), (None, "run")])
def test_the_use_of_a_directory_is_that_of_its_record(tmp_path, lock, use, found):
    write_locked(lock, {"pid": None, **({} if use is None else {"use": use})})
    assert use_of(tmp_path, read_record(tmp_path)) == found


def test_a_directory_without_a_record_holds_a_run_if_ranks_have_been_there(tmp_path):
    assert use_of(tmp_path, read_record(tmp_path)) is None
    process = RunLayout(tmp_path).rank(0).process
    process.parent.mkdir()
    process.write_text('{"pid": 3}')
    assert holds_a_run(tmp_path)


def test_a_link_in_place_of_the_record_is_refused(tmp_path):
    RunLayout(tmp_path).owner.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        open_record(RunLayout(tmp_path).owner)
