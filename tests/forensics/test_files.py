"""Files that a dying process cannot damage."""

import dataclasses
import json
import math
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from esper_lightning.forensics.files import (
    Backlog,
    JsonLines,
    encode_rows,
    read_json_lines,
    replacing,
    strict_json,
    write_atomically,
)
from esper_lightning.forensics.layout import RunLayout


def write(path, rows):
    lines = JsonLines(path)
    for row in rows:
        lines.append(row)
    lines.close()


def test_rows_come_back_as_they_were(tmp_path):
    rows = [{"iteration": 1, "x": 0.1, "none": None}, {"iteration": 2, "x": 1e-300, "none": "é\n"}]
    write(tmp_path / "deep" / "h.jsonl", rows)
    assert read_json_lines(tmp_path / "deep" / "h.jsonl") == rows


def test_numbers_that_are_not_finite_are_strict_json_and_come_back(tmp_path):
    row = {"a": math.nan, "b": math.inf, "c": -math.inf}
    write(tmp_path / "h.jsonl", [row])

    def refuse(token):
        raise AssertionError(token)

    json.loads((tmp_path / "h.jsonl").read_text(), parse_constant=refuse)
    back = read_json_lines(tmp_path / "h.jsonl")[0]
    assert math.isnan(back["a"])
    assert (back["b"], back["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_torn_last_line_is_left_out(tmp_path, cut):
    content = encode_rows([{"iteration": 1}, {"iteration": 22222}])
    (tmp_path / "h.jsonl").write_bytes(content[:-cut])
    rows = read_json_lines(tmp_path / "h.jsonl")
    assert rows[:1] == [{"iteration": 1}]
    assert len(rows) == (2 if cut == 1 else 1)


def test_damage_before_the_last_line_is_an_error(tmp_path):
    (tmp_path / "h.jsonl").write_bytes(b'{"iteration": 1}\n{"itera\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"h.jsonl:2 must be a JSON object, got b'{\"itera'\."):
        read_json_lines(tmp_path / "h.jsonl")


def test_damage_in_a_last_line_that_is_whole_is_an_error(tmp_path):
    (tmp_path / "h.jsonl").write_bytes(b'{"iteration": 1}\n{"itera\n')
    with pytest.raises(ValueError, match=r"h.jsonl:2 must be a JSON object"):
        read_json_lines(tmp_path / "h.jsonl")


def test_who_reads_a_file_that_is_replaced_goes_on_reading_the_old_one(tmp_path):
    path = tmp_path / "crash.json"
    write_atomically(path, b"old and long")
    with path.open("rb") as file:
        write_atomically(path, b"new")
        assert file.read() == b"old and long"
    assert path.read_bytes() == b"new"


class Record(NamedTuple):
    value: float
    inner: object = None


def test_records_become_objects_for_other_programs():
    @dataclasses.dataclass
    class Data:
        path: Path
        records: list[Record]

    text = strict_json(
        {"a": Data(Path("/x"), [Record(math.nan, Record(-math.inf, (1, 2)))]), 7: None}
    )
    inner = {"value": "-Infinity", "inner": [1, 2]}
    records = [{"value": "NaN", "inner": inner}]
    assert json.loads(text) == {"a": {"path": "/x", "records": records}, "7": None}


def test_a_missing_file_is_empty(tmp_path):
    assert read_json_lines(tmp_path / "h.jsonl") == []


def test_appending_keeps_what_was_there(tmp_path):
    write(tmp_path / "h.jsonl", [{"iteration": 1}])
    write(tmp_path / "h.jsonl", [{"iteration": 2}])
    assert [row["iteration"] for row in read_json_lines(tmp_path / "h.jsonl")] == [1, 2]


def test_a_row_is_in_the_file_when_append_returns(tmp_path):
    lines = JsonLines(tmp_path / "h.jsonl")
    lines.append({"iteration": 1})
    assert (tmp_path / "h.jsonl").read_bytes() == b'{"iteration":1}\n'
    lines.close()


def test_close_gives_the_descriptor_back(tmp_path):
    before = [path.name for path in Path("/proc/self/fd").iterdir()]
    write(tmp_path / "h.jsonl", [{}])
    assert [path.name for path in Path("/proc/self/fd").iterdir()] == before


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_atomically(path, b"old")

    def fails(fd):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_layout_is_what_the_design_promises(tmp_path):
    run = RunLayout(tmp_path)
    assert run.rank(3).history == tmp_path / "rank3" / "history.jsonl"
    assert run.rank(0).trace == tmp_path / "rank0" / "trace"
    assert run.rank(0).profile == tmp_path / "rank0" / "profile.txt"
    assert run.checkpoints == tmp_path / "checkpoints"
    assert run.config == tmp_path / "config.yaml"


def test_a_row_that_does_not_fit_leaves_nothing_behind(tmp_path, monkeypatch):
    file, write = JsonLines(tmp_path / "rows.jsonl"), os.write
    file.append({"iteration": 1})
    room = iter([5])

    def full(descriptor, content):
        for bytes_left in room:
            return write(descriptor, content[:bytes_left])
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        file.append({"iteration": 2})
    monkeypatch.undo()
    file.append({"iteration": 2})
    file.close()
    assert (tmp_path / "rows.jsonl").read_text() == '{"iteration":1}\n{"iteration":2}\n'


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_write_left_is_removed_by_the_next_and_what_is_being_written_is_not(tmp_path):
    path = tmp_path / "last.ckpt"
    for name in (f".last.ckpt.{dead_process()}.tmp", f".last.ckpt.{dead_process()}.7.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / f".last.ckpt.{os.getppid()}.1.tmp").write_text("being written")
    (tmp_path / f".best.ckpt.{dead_process()}.1.tmp").write_text("of another file")
    with replacing(path) as mine, replacing(path) as same_process:
        mine.write_text("mine")
        same_process.write_text("another thread's")
    assert path.read_text() == "mine"
    contents = sorted(file.read_text() for file in tmp_path.iterdir())
    assert contents == ["being written", "mine", "of another file"]


class Place:
    """A place that takes entries while it is open, and never takes a bad entry."""

    def __init__(self):
        self.open, self.taken = True, []

    def take(self, entry):
        if not self.open or entry == "bad":
            raise ValueError("it has no room") from OSError("No space left")
        self.taken.append(entry)


def test_entries_wait_in_order_with_one_warning_for_all_of_them(caplog):
    place = Place()
    backlog = Backlog("place", place.take, errors=ValueError)
    for number in range(10):
        place.open = number not in (2, 3, 4, 7)
        backlog.put(number)
        assert (backlog.error is None) == place.open
        assert len(place.taken) + len(backlog) == number + 1
    assert place.taken == list(range(10))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "place takes no rows: No space left. Training continues; rows wait to be written later.",
        "place takes rows again: none is lost.",
    ]


@pytest.mark.parametrize("drops", [False, True])
def test_an_entry_that_is_never_taken_holds_up_the_others_only_where_order_matters(drops, caplog):
    place = Place()
    backlog = Backlog("place", place.take, errors=ValueError, drops_refused=drops)
    for entry in (1, "bad", 2, 3):
        backlog.put(entry)
    assert place.taken == ([1, 2, 3] if drops else [1])
    backlog.close()
    assert f"place: {1 if drops else 3} rows are lost" in caplog.text


def test_entries_beyond_the_bound_are_lost_with_one_message(monkeypatch, caplog):
    monkeypatch.setattr("esper_lightning.forensics.files._KEPT", 3)
    place = Place()
    place.open = False
    backlog = Backlog("place", place.take, errors=ValueError)
    for number in range(9):
        backlog.put(number)
    place.open = True
    backlog.close()
    assert place.taken == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records if "lost" in record.getMessage()] == [
        "place: later rows are lost: 3 wait already.",
        "place: 6 rows are lost: none was taken.",
    ]
