"""The latest collectives of ranks name the rank that the others wait for."""

import json

import pytest

from esper_lightning.forensics.collectives import (
    Collectives,
    collectives_in,
    describe_collectives,
    read_collectives,
)
from esper_lightning.forensics.phases import PhaseRing, read_phases


def entry(number, *, retired=True, group="0", **more):
    of = {"input_sizes": [[4, 2]], "input_dtypes": ["Float"], "profiling_name": "gloo:all_reduce"}
    numbers = {"collective_seq_id": number, "record_id": number, "is_p2p": False}
    return {**of, **numbers, "retired": retired, "process_group": [group, ""], **more}


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "collectives.json"
        path.write_text(content if isinstance(content, str) else json.dumps({"entries": content}))
        return path

    return write


def test_the_collective_in_which_a_rank_waits_is_read(file):
    found = read_collectives(file([entry(7), entry(8), entry(9, retired=False)]))
    assert found is not None
    assert found.reached == 9
    assert found.finished == "#8 gloo:all_reduce of 4x2 Float"
    assert found.waits_in == "#9 gloo:all_reduce of 4x2 Float"


def test_other_groups_have_an_order_of_their_own(file):
    found = read_collectives(file([entry(7), entry(99, group="1"), entry(98, is_p2p=True)]))
    assert found is not None
    assert found.reached == 7
    assert read_collectives(file([])) == (0, None, None)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"entries": [1]}', '{"entries": [{}]}', '{"entries": 5}']
)
def test_a_damaged_file_says_nothing(file, tmp_path, content):
    assert read_collectives(file(content)) is None
    assert read_collectives(tmp_path / "absent") is None


def test_the_rank_that_never_reached_what_others_wait_in_is_named():
    waits, late = Collectives(9, "#8 a", "#9 b"), Collectives(8, "#8 a", None)
    lines = describe_collectives({0: waits, 1: late, 2: None})
    assert lines == [
        "Collectives:",
        "    rank 0: waits in #9 b; finished #8 a",
        "    rank 1: waits in none; finished #8 a",
        "Never reached #9: rank 1",
    ]


def test_the_phase_rings_name_the_rank_that_was_killed(tmp_path):
    assert collectives_in(None) is None
    rings = [PhaseRing(tmp_path / f"{rank}.ring") for rank in (0, 1)]
    assert collectives_in(read_phases(tmp_path / "0.ring")) is None
    for ring in rings:
        with ring.collective("all_reduce of 3 float32"):
            pass
    with pytest.raises(RuntimeError), rings[0].collective("all_gather of 4 float64"):
        raise RuntimeError("a peer is gone")
    found = {rank: collectives_in(read_phases(tmp_path / f"{rank}.ring")) for rank in (0, 1)}
    done = "#1 all_reduce of 3 float32"
    assert describe_collectives(found) == [
        "Collectives:",
        f"    rank 0: waits in #2 all_gather of 4 float64; finished {done}",
        f"    rank 1: waits in none; finished {done}",
        "Never reached #2: rank 1",
    ]


def test_nobody_is_named_where_nobody_waits_or_nobody_is_late():
    done, waits = Collectives(8, "#8 a", None), Collectives(9, "#8 a", "#9 b")
    assert describe_collectives({0: done, 1: done._replace(reached=7)})[-1].startswith("    rank 1")
    assert describe_collectives({0: waits, 1: waits})[-1].startswith("    rank 1")
    assert describe_collectives({0: waits, 1: None}) == []
