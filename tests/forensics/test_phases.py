"""The phase ring: open and closed phases, readable after any death."""

import mmap
import os
import random
import resource
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_lightning.forensics.phases import PhaseRing, read_phases

DIES = """
import os, sys
from pathlib import Path
from esper_lightning.forensics.phases import PhaseRing
ring = PhaseRing(Path(sys.argv[1]))
ring.iteration = 7
ring.enter("epoch")
for _ in range(10_000):
    ring.enter("step")
    ring.leave("step")
ring.enter("update")
os.kill(os.getpid(), 9)
"""


def test_a_collective_that_does_not_end_stays_open_and_is_counted(tmp_path):
    path = tmp_path / "phases.ring"
    ring = PhaseRing(path)
    with ring.collective("all_reduce of 3 float32"):
        assert read_phases(path)[-2:] == (1, 0)
    assert read_phases(path)[-2:] == (1, 1)
    ring.enter("update")
    with pytest.raises(RuntimeError), ring.collective("all_gather of 4 float64"):
        raise RuntimeError("a peer is gone")
    phases = read_phases(path)
    assert (phases.collectives_begun, phases.collectives_finished) == (2, 1)
    assert [s.name for s in phases.open] == ["update", "collective all_gather of 4 float64"]
    assert [s.name for s in phases.closed] == ["collective all_reduce of 3 float32"]
    ring.leave("update")
    assert not read_phases(path).open


def test_survives_sigkill_and_wraps_round(tmp_path):
    path = tmp_path / "phases.ring"
    status = subprocess.run([sys.executable, "-c", DIES, str(path)], check=False).returncode
    assert status == -signal.SIGKILL
    phases = read_phases(path)
    assert phases.iteration == 7
    assert [span.name for span in phases.open] == ["epoch", "update"]
    assert len(phases.closed) == 4096
    assert {span.name for span in phases.closed} == {"step"}
    begins = [span.begin_ns for span in phases.closed]
    assert begins == sorted(begins)
    assert all(span.end_ns >= span.begin_ns and span.depth == 1 for span in phases.closed)
    memory = phases.memory
    assert 1 << 20 < memory.rss_bytes <= memory.peak_bytes < memory.limit_bytes


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=40))
def test_agrees_with_a_stack(tmp_path_factory, actions):
    """Leaving a span closes all spans within it; leaving a name that is not open does nothing."""
    path = tmp_path_factory.mktemp("ring") / "phases.ring"
    ring, stack, closed = PhaseRing(path), [], []
    for enters, name in actions:
        if enters:
            ring.enter(name)
            stack.append(name)
        else:
            ring.leave(name)
            while name in stack:
                closed.append(stack.pop())
                if closed[-1] == name:
                    break
    phases = read_phases(path)
    assert [span.name for span in phases.open] == stack == ring.open_names
    assert [span.name for span in phases.closed] == closed
    ring.close()


def test_more_names_and_depth_than_there_is_room_for(tmp_path):
    ring = PhaseRing(tmp_path / "phases.ring")
    ring.enter("before")
    ring.leave("before")
    before = read_phases(tmp_path / "phases.ring").closed
    for number in range(2000):
        ring.enter(f"name {number}")
    opened = read_phases(tmp_path / "phases.ring").open
    assert [span.name for span in opened] == [f"name {number}" for number in range(64)]
    assert read_phases(tmp_path / "phases.ring").closed == before
    for number in reversed(range(2000)):
        ring.leave(f"name {number}")
    phases = read_phases(tmp_path / "phases.ring")
    assert phases.open == []
    assert phases.closed[-1].name == "name 0"
    ring.enter("name 1999")  # has the entry of the last name that there was room for
    ring.leave("name 1999")
    assert ring.open_names == []


def test_the_room_is_taken_at_once(tmp_path):
    """On a full disk, a hole in a mapped file would be a SIGBUS later."""
    PhaseRing(tmp_path / "phases.ring").close()
    size = (tmp_path / "phases.ring").stat()
    assert size.st_blocks * 512 >= size.st_size > 100_000


def test_what_is_no_ring(tmp_path):
    path = tmp_path / "phases.ring"
    with pytest.raises(FileNotFoundError):
        read_phases(path)
    path.write_bytes(b"ESPERPH1" + os.urandom(100))
    with pytest.raises(ValueError, match="must be a phase ring"):
        read_phases(path)


@pytest.mark.parametrize("begins_at", [8, 100, 1024])
def test_random_bytes_are_no_ring(tmp_path, begins_at):
    path = tmp_path / "phases.ring"
    ring = PhaseRing(path)
    for _ in range(10):
        ring.enter("update")
        ring.leave("update")
    content = path.read_bytes()
    noise = random.Random(0).randbytes(len(content) - begins_at)
    path.write_bytes(content[:begins_at] + noise)
    with pytest.raises(ValueError, match="got one with damaged content"):
        read_phases(path)


def test_a_ring_of_an_earlier_version_has_no_memory(tmp_path):
    path = tmp_path / "phases.ring"
    ring = PhaseRing(path)
    ring.enter("update")
    path.write_bytes(path.read_bytes()[:-32])
    phases = read_phases(path)
    assert ([span.name for span in phases.open], phases.memory) == (["update"], None)


def test_memory_is_that_of_now(tmp_path):
    ring = PhaseRing(tmp_path / "phases.ring")
    before = read_phases(tmp_path / "phases.ring").memory
    kept = mmap.mmap(-1, 1 << 26)  # and not what an allocator may have at hand
    kept.write(os.urandom(1 << 16) * 1024)
    ring.note_memory()
    after = read_phases(tmp_path / "phases.ring").memory
    assert after.rss_bytes - before.rss_bytes > len(kept) // 2
    ring.close()
    ring.note_memory()  # the thread that watches may come late


def test_a_ring_that_is_in_use_stays_whole_when_another_takes_its_place(tmp_path):
    path = tmp_path / "phases.ring"
    first = PhaseRing(path)
    second = PhaseRing(path)  # truncated under the first one, this would be SIGBUS
    first.enter("first")
    second.enter("second")
    assert [span.name for span in read_phases(path).open] == ["second"]
    assert first.open_names == ["first"]


def test_without_room_for_the_file_spans_are_known_to_the_process(tmp_path):
    path = tmp_path / "phases.ring"
    PhaseRing(path).enter("of an earlier run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        ring = PhaseRing(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(ring.error, OSError)
    assert not path.exists()
    ring.enter("update")
    assert ring.open_names == ["update"]
