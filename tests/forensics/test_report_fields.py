"""Reports come back as they were, and what is none is none."""

import json
from pathlib import Path

import pytest

from esper_lightning.forensics.asides import set_aside
from esper_lightning.forensics.report import read_report, what_happened, write_report


def test_what_json_does_not_know_becomes_text(tmp_path):
    path = tmp_path / "deep" / "crash.json"
    write_report(path, {"cause": "exception", "where": Path("/a/b"), "share": 0.5})
    assert read_report(path) == {
        "schema": 1,
        "cause": "exception",
        "where": "/a/b",
        "share": 0.5,
    }


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b'{"cause": ', b"\xff\xfe\x00"])
def test_what_is_no_report_is_none(tmp_path, content):
    path = tmp_path / "crash.json"
    assert read_report(path) is None
    path.write_bytes(content)
    assert read_report(path) is None


@pytest.mark.parametrize(
    ("report", "text"),
    [
        ({"error": {"type": "ValueError", "message": "no"}}, "ValueError: no"),
        ({"error": {"type": "KeyboardInterrupt", "message": ""}}, "KeyboardInterrupt"),
        ({"cause": "vanished", "error": {"type": None, "message": "It vanished."}}, "It vanished."),
        ({"cause": "signal", "signal": "SIGTERM"}, "SIGTERM"),
        ({"cause": "hang"}, "hang"),
        ({"cause": "peer", "peer": {"rank": 1, "reason": "it failed"}}, "rank 1: it failed"),
        (
            {"cause": "exception", "error": {"type": "E"}, "peer": {"rank": 1, "reason": "later"}},
            "E",
        ),
        (
            {"cause": "peer", "error": {"type": "PeerFailedError", "message": "x"}},
            "PeerFailedError: x",
        ),
        ({}, ""),
    ],
)
def test_what_ended_a_run_in_a_few_words(report, text):
    assert what_happened(json.loads(json.dumps(report))) == text


def test_nothing_that_was_set_aside_is_replaced(tmp_path):
    path, aside = tmp_path / "crash.json", []
    assert set_aside(path) is None
    for number in range(3):
        path.write_text(str(number))
        aside.append(set_aside(path))
    assert [found.name for found in aside] == ["crash.json.1", "crash.json.2", "crash.json.3"]
    assert [found.read_text() for found in aside] == ["0", "1", "2"]
    assert not path.exists()
