"""The directory of a run: who was asked first, and what is already there."""

import errno
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from esper_lightning.callbacks import directory_choice
from esper_lightning.callbacks.directory_choice import (
    WritesRun,
    claim_logger_folders,
    claim_new,
    given_directory,
    take_directory,
)
from esper_lightning.callbacks.held_directory import OF_TRAINERS
from esper_lightning.forensics.claims import DirectoryRefusedError


class Writes(WritesRun):
    pass


def test_callbacks_that_were_given_a_directory_decide_and_must_agree(tmp_path):
    def given(*callbacks):
        return given_directory(SimpleNamespace(callbacks=[Callback(), *callbacks]))

    assert given() is given(Writes()) is None
    assert given(Writes(), Writes(tmp_path), Writes(str(tmp_path))) == tmp_path
    with pytest.raises(DirectoryRefusedError, match="A run has one directory") as refused:
        given(Writes(), Writes(tmp_path), Writes("elsewhere"))
    assert "\n" not in str(refused.value)
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


@pytest.mark.parametrize("kind", ["link", "folder"])
@pytest.mark.parametrize("choice", ["callback", "logger"])
def test_a_directory_that_exists_and_cannot_be_claimed_is_refused(
    make_trainer, tmp_path, kind, choice
):
    lock = tmp_path / "run" / "version_0" / "owner.lock"
    lock.parent.mkdir(parents=True)
    lock.symlink_to(tmp_path / "elsewhere") if kind == "link" else lock.mkdir()
    given = choice == "callback"
    callbacks = [Writes(lock.parent)] if given else []
    logger = False if given else CSVLogger(tmp_path, "run", 0)
    trainer = make_trainer(callbacks=callbacks, logger=logger)
    with pytest.raises(DirectoryRefusedError, match="must be one that can be claimed") as refusal:
        take_directory(trainer)
    assert "\n" not in str(refusal.value)
    assert str(lock.parent) in str(refusal.value)


def test_a_folder_of_a_logger_with_a_claim_that_cannot_be_read_is_refused(make_trainer, tmp_path):
    (tmp_path / "logs" / "version_0" / "owner.lock").mkdir(parents=True)
    logger = CSVLogger(tmp_path, "logs", 0)
    trainer = make_trainer(callbacks=[Writes(tmp_path / "run")], logger=logger)
    found = take_directory(trainer)
    with pytest.raises(DirectoryRefusedError, match="folder of CSVLogger must be one that can be"):
        claim_logger_folders(trainer, found)
    found.release()


def test_where_no_directory_can_be_made_a_run_goes_on_and_tries_again(
    make_trainer, tmp_path, monkeypatch
):
    def full(directory):
        raise OSError(errno.ENOSPC, "No space left")

    trainer = make_trainer(callbacks=[Writes(tmp_path / "run")])
    with monkeypatch.context() as patch:
        patch.setattr(directory_choice, "claim", full)
        found = OF_TRAINERS[trainer] = take_directory(trainer)
        assert found.claim is None
        found.directory.mkdir()  # by the first file that fits
        assert take_directory(trainer) is found
        with pytest.raises(DirectoryRefusedError):  # of another run
            take_directory(make_trainer(callbacks=[Writes(tmp_path / "run")]))
    assert take_directory(trainer).claim is not None
    found.release()
