"""The text of ``esper crash`` is right for every amount of evidence."""

from pathlib import Path

import pytest

from esper_lightning.cli.crash_text import describe, describe_start, seconds_by_phase
from esper_lightning.forensics.phases import Phases, Span
from esper_lightning.forensics.remains import Remains
from esper_lightning.forensics.report import CrashReport, Evidence, PeerReport

S = 1_000_000_000


def remains(**known):
    empty = {
        "rank": 0,
        "state": "failed",
        "world_size": 1,
        "started_s": 1.0,
        "report": None,
        "unreadable": {},
        "rows": 0,
        "history": [],
        "damaged_rows": 0,
        "remarks": [],
        "phases": None,
        "windows": [],
    }
    return Remains(**{**empty, **known})


def test_the_time_of_a_phase_is_its_own_without_that_of_phases_within():
    closed = [
        Span("step", 1 * S, 3 * S, 1, 1),
        Span("rollout", 0 * S, 4 * S, 1, 0),
        Span("update", 4 * S, 5 * S, 1, 0),
    ]
    seconds = seconds_by_phase(Phases(1, [], closed, None))
    assert list(seconds.items()) == [("step", 2.0), ("rollout", 2.0), ("update", 1.0)]
    assert seconds_by_phase(None) == {}


def test_without_evidence_the_text_says_so(tmp_path):
    text = "\n".join(describe(tmp_path, [remains()], remains()))
    for line in ("No iteration was finished.", "No phases on record.", "No trace.", "Evidence: "):
        assert line in text


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ("model: {}", "esper replay {here} {there}"),
        ("env: {class_path: __main__.Maze}", "in Python, replay(trainer, model, RUN_DIR)"),
        (None, "in Python, replay(trainer, model, RUN_DIR)"),
    ],
)
def test_the_line_to_type_for_a_replay_fits(tmp_path, config, how):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    if config is not None:
        (there / "config.yaml").write_text(config)
    ranks = [remains(directory=here), remains(rank=1, directory=there)]
    assert describe(here, ranks, ranks[0])[-1].strip() == how.format(here=here, there=there)


def test_the_folder_of_the_first_failure_is_asked_for(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {}")
    report = CrashReport(cause="peer", peer=PeerReport(rank=1, reason="it failed"))
    rank = remains(report=report, world_size=2, directory=tmp_path)
    asked = f"esper replay {tmp_path} DIR_OF_THE_OTHER_HOST"
    assert describe(tmp_path, [rank], rank)[-1].strip() == asked


def test_rows_that_the_disk_did_not_take_are_not_told_as_none(tmp_path):
    report = CrashReport(
        iteration=10, evidence={"history": Evidence(state="failed", detail="full")}
    )
    rank = remains(report=report)
    text = "\n".join(describe(tmp_path, [rank], rank))
    assert "No row of the history can be read." in text
    assert "No iteration was finished." not in text


def test_without_a_death_the_states_are_named(tmp_path):
    ranks = [remains(state="finished"), remains(rank=1, state="running")]
    text = "\n".join(describe(tmp_path, ranks, None))
    assert "No death on record: finished, running." in text


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    rank = remains(unreadable={"crash.json": "it is no JSON object"})
    text = "\n".join(describe(tmp_path, [rank], rank))
    assert "Rank 0: crash.json is there and cannot be read: it is no JSON object" in text


@pytest.mark.parametrize("value", [None, "x" * 500, float("nan"), 10**30, True])
def test_no_line_is_longer_than_a_screen_whatever_the_rows_hold(tmp_path, value):
    row = {"iteration": 1, "loss": value, **{f"group/{'n' * k}": 1.0 for k in range(1, 40)}}
    rank = remains(rows=1, history=[row], report=CrashReport(cause="exception"))
    lines = describe(Path("run"), [rank], rank)
    assert max(map(len, lines)) <= 130
    assert "Not shown: " in "\n".join(lines)


def test_a_process_that_died_before_it_recorded_anything_is_described():
    told = describe_start({"pid": 2**22 + 1, "host": "elsewhere"})
    assert f"Process {2**22 + 1} on elsewhere" in told
