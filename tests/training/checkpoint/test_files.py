"""Checkpoints are written whole or not at all, and errors say what is wrong with a file."""

import fractions
import pickle
import random
import re

import pytest
import torch

from esper_lightning import PPO, AtomicCheckpointIO
from esper_lightning.envs import CartPole
from esper_lightning.forensics.claims import DirectoryInUseError
from esper_lightning.training.checkpoint.files import read_checkpoint
from tests import forked

CONTENT = {"weight": torch.arange(3.0), "nested": {"count": torch.ones(2, dtype=torch.int64)}}
CONTENT |= {"number": 7, "share": 1.5}


@pytest.fixture
def path(tmp_path):
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "below" / "x.ckpt")
    return tmp_path / "below" / "x.ckpt"


def assert_is_content(read):
    assert read.keys() == CONTENT.keys()
    assert torch.equal(read["weight"], CONTENT["weight"])
    assert torch.equal(read["nested"]["count"], CONTENT["nested"]["count"])
    assert (read["number"], read["share"]) == (7, 1.5)


def refusal(path) -> str:
    with pytest.raises(ValueError, match=re.escape(f"got {str(path)!r}. ")) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def is_seen(path, damaged) -> bool:
    """Whether a damaged file is refused; if it is read, it must hold what the whole file holds."""
    path.write_bytes(damaged)
    try:
        read = read_checkpoint(path)
    except ValueError:
        return len(refusal(path)) > 0
    assert_is_content(read)
    return False


def test_nothing_is_written_into_the_directory_of_another_run(path, monkeypatch):
    asked, before = [], path.read_bytes()

    def refuse(place):
        asked.append(place)
        raise DirectoryInUseError

    monkeypatch.setattr("esper_lightning.training.checkpoint.files.refuse_taken", refuse)
    with pytest.raises(DirectoryInUseError):
        AtomicCheckpointIO().save_checkpoint({}, path)
    assert (asked, path.read_bytes()) == ([path], before)


def test_what_is_saved_can_be_read(path):
    assert_is_content(AtomicCheckpointIO().load_checkpoint(path))
    assert [file.name for file in path.parent.iterdir()] == ["x.ckpt"]


def test_a_file_that_is_cut_off_anywhere_is_refused(path):
    whole = path.read_bytes()
    for length in (1, 3, 4, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "must name a whole checkpoint" in refusal(path)
    path.write_bytes(b"")
    assert refusal(path).endswith(" It is empty.")


def test_a_flipped_bit_anywhere_is_seen_or_changes_nothing(path):
    """``torch.load`` alone takes a flipped bit of a weight as it is."""
    whole, choice = path.read_bytes(), random.Random(0)
    seen = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << choice.randrange(8)
        seen += is_seen(path, damaged)
    assert seen > len(whole) // 3


def test_a_flipped_bit_in_the_table_of_contents_is_seen_or_changes_nothing(path):
    """One of these bits makes torch return memory that was never written."""
    whole = path.read_bytes()
    start = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))
    for place in range(start, start + 46):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            is_seen(path, damaged)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    with pytest.raises(ValueError, match=r"^ckpt_path must name an existing checkpoint, got '.*x"):
        read_checkpoint(path)
    path.write_text("model:\n")
    assert refusal(path).endswith(" It begins with b'mode', which is no file of torch.save.")
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    assert "no file of torch.save" in refusal(path)
    torch.save([1, 2], path)
    assert refusal(path).endswith(" It holds a list.")
    assert refusal(tmp_path).endswith(" It is a directory.")


def test_objects_in_a_file_are_named_and_not_built(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}, "settings": fractions.Fraction(1, 2)}, path)
    message = refusal(path)
    assert "ckpt_path must hold only tensors and plain data" in message
    assert "fractions.Fraction" in message
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=False)["settings"] == 0.5


def test_remote_places_are_left_to_lightning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AtomicCheckpointIO().save_checkpoint(CONTENT, "memory://run/x.ckpt")
    assert list(tmp_path.iterdir()) == []
    assert_is_content(AtomicCheckpointIO().load_checkpoint("memory://run/x.ckpt"))


def test_a_trainer_reads_through_it(path, make_trainer):
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="must name a whole checkpoint"):
        make_trainer(plugins=[AtomicCheckpointIO()]).fit(PPO(CartPole(num_envs=4)), ckpt_path=path)


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.5.0"}, path)
    with pytest.raises(ValueError, match=r"must name a checkpoint of PPO, got '.*x.ckpt'"):
        PPO.load_from_checkpoint(path)


# A child for each place in which a save can be killed, forked before any thread is there.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from esper_lightning.training.checkpoint.files import AtomicCheckpointIO, read_checkpoint

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Torn:
    def __init__(self, file, room):
        self.file, self.room = file, room
    def write(self, piece):
        piece = bytes(piece)[:self.room]
        self.file.write(piece)
        self.room -= len(piece)
        if self.room <= 0:
            self.file.flush()
            die()
        return len(piece)

save, replace = torch.save, Path.replace
path = Path(sys.argv[1])
AtomicCheckpointIO().save_checkpoint({"number": 1, "weight": torch.zeros(10_000)}, path)
for place in ("1", "5000", "39000", "fsync", "rename", "renamed"):
    pid = os.fork()
    if pid == 0:
        if place == "fsync":
            os.fsync = die
        elif place == "rename":
            Path.replace = die
        elif place == "renamed":
            Path.replace = lambda *paths: (replace(*paths), die())
        else:
            torch.save = lambda content, file: save(content, Torn(file, int(place)))
        AtomicCheckpointIO().save_checkpoint({"number": 2, "weight": torch.ones(10_000)}, path)
    _, status = os.waitpid(pid, 0)
    read = read_checkpoint(path)
    assert torch.equal(read["weight"], torch.full((10_000,), read["number"] - 1.0))
    print(place, os.WTERMSIG(status), read["number"], len(list(path.parent.iterdir())))
AtomicCheckpointIO().save_checkpoint({"number": 3}, path)
print("after", read_checkpoint(path)["number"], [file.name for file in path.parent.iterdir()])
"""


@pytest.mark.crash
def test_a_save_that_is_killed_leaves_the_previous_file(tmp_path):
    path = str(tmp_path / "checkpoints" / "last.ckpt")
    done = forked.run(["-c", KILLED, path])
    assert done.stdout.splitlines() == [
        "1 9 1 2",
        "5000 9 1 3",
        "39000 9 1 4",
        "fsync 9 1 5",
        "rename 9 1 6",
        "renamed 9 2 6",
        "after 3 ['last.ckpt']",
    ], done.stderr


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from esper_lightning.training.checkpoint.files import AtomicCheckpointIO

path = Path(sys.argv[1])
AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(10)}, path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for size in (100_000, 5_000):  # the second one fails when the buffer is written
    try:
        AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(size)}, path)
    except OSError as error:
        print(error.strerror, error.filename == str(path))
print([file.name for file in path.parent.iterdir()])
"""


def test_a_full_disk_is_an_error_and_leaves_the_previous_file(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    done = forked.run(["-c", FULL, path])
    assert done.stdout.splitlines() == [*["File too large True"] * 2, "['last.ckpt']"], done.stderr
    assert torch.equal(read_checkpoint(path)["weight"], torch.zeros(10))
