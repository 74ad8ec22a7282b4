"""Reports can be written on a full disk."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from esper_lightning.forensics.report import CrashReport, ErrorReport
from esper_lightning.forensics.room import release_room, reserve_room, write_json
from tests.disks import fill
from tests.reports import read_report


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


class TestOnAFullDisk:
    def test_every_version_of_every_report_is_written_into_reserved_room(self, small_disk):
        reserve_room(small_disk)
        write_json(small_disk / "process.json", {"state": "running"})
        fill(small_disk)
        with pytest.raises(OSError, match="No space"):
            (small_disk / "other").write_bytes(bytes(100_000))
        for number in range(20):
            write_json(small_disk / "crash.json", {"number": number, "text": "x" * 30_000})
            write_json(small_disk / "process.json", {"state": "failed", "number": number})
            assert read_report(small_disk / "crash.json")["number"] == number
            state = read_report(small_disk / "process.json")
            assert (state["state"], state["number"]) == ("failed", number)
            assert not list(small_disk.glob("*.tmp")) + list(small_disk.glob(".*.tmp"))

    def test_a_report_longer_than_its_room_is_shortened_and_keeps_the_end_of_the_traceback(
        self, small_disk
    ):
        reserve_room(small_disk)
        fill(small_disk)
        traceback = [f"line {number} " + "x" * 500 for number in range(2000)]
        message = "m" * 200_000
        error = ErrorReport(type="ValueError", message=message, traceback=tuple(traceback))
        CrashReport(cause="exception", error=error).write(small_disk / "crash.json")
        report = read_report(small_disk / "crash.json")
        assert (report["cause"], report["error"]["type"]) == ("exception", "ValueError")
        assert report["error"]["message"].startswith("mmm")
        assert report["error"]["traceback"][-1].startswith("line 1999 ")

    def test_without_reserved_room_it_is_an_error_and_the_report_before_stays(self, small_disk):
        write_json(small_disk / "crash.json", {"number": 1})
        fill(small_disk)
        with pytest.raises(OSError, match="No space"):
            write_json(small_disk / "crash.json", {"number": 2, "text": "x" * 30_000})
        assert read_report(small_disk / "crash.json")["number"] == 1

    def test_a_competitor_that_takes_whatever_is_freed_does_not_get_the_room(self, small_disk):
        reserve_room(small_disk)
        for number in range(5):
            fill(small_disk)
            write_json(small_disk / "crash.json", {"number": number})
        assert read_report(small_disk / "crash.json")["number"] == 4


def test_where_no_file_may_grow_the_report_is_written_into_reserved_room(tmp_path):
    reserve_room(tmp_path)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        write_json(tmp_path / "crash.json", {"number": 1})
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert read_report(tmp_path / "crash.json")["number"] == 1


@pytest.mark.parametrize("limit", [65536, 16384, 4096, 1024])
@pytest.mark.parametrize("reserved", [False, True])
def test_a_limit_on_the_size_of_files_leaves_as_much_of_a_report_as_it_allows(
    tmp_path, limit, reserved
):
    lines = ("line " * 99,) * 999
    report = CrashReport(
        cause="exception",
        pid=1,
        host="a" * 30,
        boot="b" * 36,
        error=ErrorReport(type="ValueError", message="m" * 99_999, traceback=lines),
        metrics={str(number): 0.5 for number in range(9999)},
        event_files=tuple(f"events.out.tfevents.{number}.{'a' * 30}" for number in range(20)),
    )
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if reserved:
            reserve_room(tmp_path)
        report.write(tmp_path / "crash.json")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    found = read_report(tmp_path / "crash.json")
    assert found["cause"] == "exception"
    assert found["boot"] == "b" * 36
    assert found["error"]["message"].startswith("m" * 64)


def test_room_is_given_back(tmp_path):
    reserve_room(tmp_path)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) >= 3 * 65536
    write_json(tmp_path / "crash.json", {"number": 1})
    release_room(tmp_path)
    assert list(contents(tmp_path)) == ["crash.json"]
    assert json.loads(contents(tmp_path)["crash.json"]) == {"number": 1}


def test_what_json_does_not_know_becomes_text(tmp_path):
    path = tmp_path / "deep" / "crash.json"
    write_json(path, {"cause": "exception", "where": Path("/a/b"), "share": 0.5})
    assert read_report(path) == {"cause": "exception", "where": "/a/b", "share": 0.5}
