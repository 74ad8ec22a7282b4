"""Any file in a run directory is read in bounded time and memory."""

import os
import subprocess
import sys

import pytest

from esper_lightning.forensics.files import encode_rows, read_json_lines
from esper_lightning.forensics.reading import (
    RowOrder,
    RowReader,
    parse_json,
    printable,
    read_file,
    refuse_unbounded,
)
from esper_lightning.forensics.report import CrashReport


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (lambda path: path.mkdir(), "it is a directory"),
        (os.mkfifo, "it is a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_is_not_read(tmp_path, place, reason):
    path = tmp_path / "crash.json"
    place(path)
    with pytest.raises(ValueError, match=reason):
        read_file(path)
    assert CrashReport.read(path) is None
    with pytest.raises(ValueError, match=f"crash.json cannot be read: {reason}"):
        read_json_lines(path)


def test_a_link_to_nothing_is_nothing(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("nowhere")
    assert read_json_lines(tmp_path / "a.jsonl") == []


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", most_bytes=5) == b"12345"
    with pytest.raises(ValueError, match="longer than 4 bytes"):
        read_file(tmp_path / "a", most_bytes=4)


@pytest.mark.parametrize("text", ["[" * 200 + "]" * 200, "[" * 10**6, '{"a":' * 10**5])
def test_depth_is_refused(text):
    with pytest.raises(ValueError, match=r"deep|Expecting"):
        parse_json(text.encode())


def test_numbers_are_such_as_everything_can_work_with():
    digits = "9" * 5000
    assert parse_json(f"[{10**18 - 1}, {digits}, -{digits}, 1e999]".encode()) == [
        10**18 - 1,
        float("inf"),
        -float("inf"),
        float("inf"),
    ]


def test_entries_are_counted_over_all_that_hold_some():
    half = [0] * 499_999
    refuse_unbounded([half, {"a": half[1:]}])
    for too_many in ([half, half, [0]], {"a": half, "b": {"c": half, "d": 0}}):
        with pytest.raises(ValueError, match="it has more than 1,000,000 entries"):
            refuse_unbounded(too_many)


def test_what_holds_itself_or_stands_for_billions_is_refused():
    itself: list[object] = []
    itself.append(itself)
    laughs: list[object] = ["x"]
    for _ in range(30):
        laughs = [laughs, laughs]
    for endless in (itself, laughs):
        with pytest.raises(ValueError, match=r"it (is nested|has) more than"):
            refuse_unbounded(endless)


LONG = """
import re, sys
from pathlib import Path
from esper_lightning.forensics.reading import RowReader
rows = RowReader(Path(sys.argv[1]))
last = list(rows)[-1:]
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(rows.rows, rows.damaged, rows.left_out_bytes, last, peak, sep=";")
"""


@pytest.mark.parametrize("has_lines", [True, False])
def test_ten_gigabytes_are_read_at_both_ends(tmp_path, has_lines):
    path = tmp_path / "history.jsonl"
    row = encode_rows([{"iteration": 1}])
    with path.open("wb") as file:
        file.write(row * has_lines)
        file.truncate(10 << 30)
        file.seek(0, os.SEEK_END)
        file.write((b"\n" + row) * has_lines)
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    rows, damaged, left_out, last, peak_kb = done.stdout.strip().split(";")
    assert (rows, last) == (("2", "[{'iteration': 1}]") if has_lines else ("0", "[]"))
    assert int(damaged) >= 1
    assert int(left_out) > 9 << 30
    assert int(peak_kb) < 60_000


def test_the_middle_of_a_long_history_is_said_to_be_left_out(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(encode_rows({"iteration": k} for k in range(1, 1001)))
    rows = RowReader(path, most_bytes=1000)
    read = [row["iteration"] for row in rows]
    assert read[0] == 1
    assert read[-1] == 1000
    assert 20 < len(read) < 100
    assert rows.damaged == 0
    (remark,) = rows.remarks
    assert remark.startswith("The middle of history.jsonl, 0 MB")


def remarks(tmp_path, rows) -> str:
    path = tmp_path / "history.jsonl"
    path.write_bytes(encode_rows(rows))
    reader = RowReader(path)
    assert list(reader) == list(rows)  # in the file's order, each as often as it is there
    return " ".join(reader.remarks)


@pytest.mark.parametrize(
    ("iterations", "said"),
    [
        ([1, 2, 3, 4], ""),
        ([7, 8, 9], ""),  # resumed in another directory
        ([2, 4, 6], ""),  # two optimizers
        ([1, 1, 2, 2], "2 repeated"),
        ([1, 2, 3, 1, 2, 3], "3 repeated"),
        ([1, 3, 2, 4], "1 out of order"),
        ([1, 2, 5, 6], "2 missing"),
        ([3, 2, 1, 4, 6], "2 out of order, 1 missing"),
        ([1, 2, "3", True, None, -4, 3], "4 without an iteration"),
        ([1, 10**17], ""),
        ([1, 2, 10**17], f"{10**17 - 3:,} missing"),
    ],
)
def test_rows_that_are_not_in_order_are_counted(tmp_path, iterations, said):
    text = remarks(tmp_path, [{"iteration": k} for k in iterations])
    begins = "history.jsonl has not one row for each iteration in order: of "
    assert text == (f"{begins}{len(iterations)} rows, {said}." if said else "")


def test_env_steps_that_go_back_are_counted(tmp_path):
    rows = [{"iteration": k, "env_steps": e} for k, e in enumerate([10, 20, 5, 30, "40"], 1)]
    assert remarks(tmp_path, rows).endswith("of 5 rows, 1 going back in env_steps.")


def test_terminals_get_no_control_characters():
    assert printable("a\x1b[31mb\nc\ud800d\u202e é") == r"a\x1b[31mb\nc\ud800d\u202e é"


@pytest.mark.parametrize(("iterations", "disorder"), [
    ([10, 20, 30, 32], ""),
    ([50, 100, 110], ""),
    ([5, 10, 20, 22], "1 missing"),
    ([10, 30, 40, 50], "1 missing"),
])  # fmt: skip
def test_the_last_epoch_of_a_run_may_be_short(iterations, disorder) -> None:
    order = RowOrder(last_is_short=True)
    for iteration in iterations:
        order.add({"iteration": iteration})
    assert order.disorder == disorder
