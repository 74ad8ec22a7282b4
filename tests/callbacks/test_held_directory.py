"""A directory is held until it is released, and copied to its address before that."""

from types import SimpleNamespace

import pytest

from esper_lightning.callbacks import held_directory
from esper_lightning.callbacks.address_claims import read_claims
from esper_lightning.callbacks.held_directory import HeldDirectory
from esper_lightning.forensics.claims import DirectoryInUseError, claim


class Mirror:
    """Notes what was copied, and whether the directory was still held."""

    def __init__(self, directory, address, rank, claims):
        self.seen = SimpleNamespace(directory=directory, address=address, rank=rank, claims=claims)
        COPIES.append(self.seen)

    def copy(self, *, seconds):
        with pytest.raises(DirectoryInUseError):
            claim(self.seen.directory)
        self.seen.copied = True


COPIES: list[SimpleNamespace] = []


def test_a_directory_that_is_held_belongs_to_no_other_run_until_it_ends(tmp_path):
    held = HeldDirectory(tmp_path / "run", claim(tmp_path / "run"))
    held.begin(rank=0)
    held.users.add(1)
    with pytest.raises(DirectoryInUseError):
        claim(tmp_path / "run")
    held.end()
    assert (held.is_open, held.users) == (False, set())
    claim(tmp_path / "run").release()


def test_the_last_copy_to_an_address_is_made_while_the_directory_is_held(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(held_directory, "Mirror", Mirror)
    held = HeldDirectory(tmp_path / "run", claim(tmp_path / "run"), "memory://there")
    held.begin(rank=3)
    assert "is copied to memory://there at checkpoints" in caplog.text
    held.end()
    (copy,) = COPIES
    assert (copy.address, copy.rank, copy.copied) == ("memory://there", 3, True)
    assert copy.claims == read_claims(tmp_path / "run")
    assert held.mirror is None


def test_a_directory_that_no_run_used_is_removed_again(tmp_path):
    held = HeldDirectory(tmp_path / "run", claim(tmp_path / "run"))
    assert (tmp_path / "run").exists()
    held.release()
    assert not (tmp_path / "run").exists()
