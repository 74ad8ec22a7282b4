"""Messages of errors are compared without what differs from run to run."""

from pathlib import Path

import pytest

from esper_lightning.forensics.messages import comparable

RUNS = Path("/runs/a.b"), Path("/runs/replay_of_a.b")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("3 of -1.5e-07 at 0x7fAB", "# of # at #"),
        ("no /runs/a.b/x, no runs/replay_of_a.b/x", "no RUN_DIR/x, no RUN_DIR/x"),
        ("'/runs//replay_of_a.b//x'", "'RUN_DIR//x'"),
        ("/runs/axb/x and /runs/a.bc", "/runs/axb/x and /runs/a.bc"),
        ("another_a.b a.b", "another_a.b RUN_DIR"),
    ],
)
def test_numbers_and_run_directories_have_one_name(message, expected):
    assert comparable(message, RUNS) == expected


def test_a_long_message_takes_no_time():
    assert comparable("a" * 1_000_000, RUNS) == "a" * 1_000_000
