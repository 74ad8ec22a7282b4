"""Where a run writes after its directory was moved, and another run took the name."""

import shutil
import tempfile

import pytest

from esper_lightning.forensics.claims import DirectoryInUseError, claim
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.place import Place, refuse_taken


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def place(run):
    held = claim(run)
    place = Place(run)
    yield place
    place.close()
    held.release()


def leave_a_run_in(run):
    """What a run leaves that has ended."""
    held = claim(run)
    (run / "file").touch()
    held.release()


def test_a_directory_whose_name_nobody_took_stays_at_its_path(place, run):
    assert place() == run
    run.rename(run.with_name("moved"))
    assert (place(), place.is_taken) == (run, False)
    run.mkdir()  # by the run itself
    refuse_taken(run / "checkpoints" / "last.ckpt")
    assert (place(), place.is_taken) == (run, False)


@pytest.mark.parametrize("lives", [True, False])
def test_a_run_follows_its_directory_where_another_run_took_the_name(place, run, lives):
    moved, layout = run.with_name("moved"), RunLayout(place)
    files = layout.rank(3)
    run.rename(moved)
    another = claim(run)
    (run / "file").touch()
    if not lives:
        another.release()
    assert (layout.owner, files.crash) == (moved / "owner.lock", moved / "rank3" / "crash.json")
    with pytest.raises(DirectoryInUseError, match=r"another run took its name\. .* in .*/moved\."):
        refuse_taken(run / "checkpoints" / "last.ckpt")
    refuse_taken(moved / "checkpoints" / "last.ckpt")
    moved.rename(run.with_name("again"))
    assert place() == run.with_name("again")
    place.close()
    assert place() == run.with_name("again")
    refuse_taken(run / "checkpoints" / "last.ckpt")  # the run has ended
    another.release()


def test_a_directory_that_comes_back_is_that_of_its_run_again(place, run):
    run.rename(run.with_name("moved"))
    leave_a_run_in(run)
    assert place() == run.with_name("moved")
    shutil.rmtree(run)
    run.with_name("moved").rename(run)
    assert place() == run


def test_files_for_which_no_folder_is_left_are_temporary(place, run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shutil.rmtree(run)
    leave_a_run_in(run)
    folder = place()
    assert folder.parent == tmp_path
    assert folder.name.startswith("run-")
    assert place() == folder


def test_the_next_run_of_a_process_may_take_the_name_of_a_moved_one(place, run):
    run.rename(run.with_name("moved"))
    held = claim(run)
    following = Place(run)
    refuse_taken(run / "last.ckpt")
    following.close()
    held.release()


def test_a_directory_without_an_owner_is_never_taken(run):
    place = Place(run)
    leave_a_run_in(run)
    assert (place(), place.is_taken) == (run, False)
