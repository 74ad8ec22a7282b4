"""The directory of a run: who was asked first, and what is already there."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback

from esper_lightning.callbacks.directory_choice import (
    WritesRun,
    claim_new,
    given_directory,
    take_directory,
)


class Writes(WritesRun):
    pass


def test_the_first_callback_that_was_given_a_directory_decides(tmp_path):
    def given(*callbacks):
        return given_directory(SimpleNamespace(callbacks=[Callback(), *callbacks]))

    assert given() is given(Writes()) is None
    assert given(Writes(), Writes(tmp_path), Writes("elsewhere")) == tmp_path
    with pytest.raises(ValueError, match=r"^Writes.dirpath must name a directory, got ''"):
        Writes("")


def test_a_directory_that_was_given_is_claimed_and_else_a_new_one_is_numbered(
    make_trainer, tmp_path
):
    held, address = claim_new(make_trainer(callbacks=[Writes(tmp_path / "mine")]), tmp_path)
    assert (held.directory, address) == (tmp_path / "mine", None)
    held.release()
    numbers = [claim_new(make_trainer(), tmp_path / "many")[0] for _ in range(3)]
    names = [each.directory.relative_to(tmp_path).as_posix() for each in numbers]
    assert names == ["many/version_0", "many/version_1", "many/version_2"]
    for each in numbers:
        each.release()


def test_a_root_of_its_own_is_taken_and_one_with_the_files_of_a_run_is_not(make_trainer, tmp_path):
    root = tmp_path / "root"
    found = take_directory(make_trainer(default_root_dir=root))
    assert found.directory == root
    found.release()
    (root / "rank0").mkdir(parents=True)
    (root / "rank0" / "history.jsonl").touch()
    other = take_directory(make_trainer(default_root_dir=root))
    assert other.directory == root / "lightning_logs" / "version_0"
    other.release()
