"""Reports that are written on a full disk, and files that make room for others."""

import json
import multiprocessing
import os
import resource
import signal
import sys

import pytest

from esper_lightning.forensics.asides import KEPT_ASIDE, replace_keeping, set_aside, write_aside
from esper_lightning.forensics.report import read_report, release_room, reserve_room, write_report
from tests.disks import fill


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def asides(path):
    return sorted(path.parent.glob(f"{path.name}.*"), key=lambda aside: int(aside.suffix[1:]))


class TestOnAFullDisk:
    def test_every_version_of_every_report_is_written_into_reserved_room(self, small_disk):
        reserve_room(small_disk)
        write_report(small_disk / "process.json", {"state": "running"})
        fill(small_disk)
        with pytest.raises(OSError, match="No space"):
            (small_disk / "other").write_bytes(bytes(100_000))
        for number in range(20):
            write_report(small_disk / "crash.json", {"number": number, "text": "x" * 30_000})
            write_report(small_disk / "process.json", {"state": "failed", "number": number})
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
        error = {"type": "ValueError", "message": "m" * 200_000, "traceback": traceback}
        write_report(small_disk / "crash.json", {"cause": "exception", "error": error})
        report = read_report(small_disk / "crash.json")
        assert (report["cause"], report["error"]["type"]) == ("exception", "ValueError")
        assert report["error"]["message"].startswith("mmm")
        assert report["error"]["traceback"][-1].startswith("line 1999 ")

    def test_without_reserved_room_it_is_an_error_and_the_report_before_stays(self, small_disk):
        write_report(small_disk / "crash.json", {"number": 1})
        fill(small_disk)
        with pytest.raises(OSError, match="No space"):
            write_report(small_disk / "crash.json", {"number": 2, "text": "x" * 30_000})
        assert read_report(small_disk / "crash.json")["number"] == 1

    def test_a_competitor_that_takes_whatever_is_freed_does_not_get_the_room(self, small_disk):
        reserve_room(small_disk)
        for number in range(5):
            fill(small_disk)
            write_report(small_disk / "crash.json", {"number": number})
        assert read_report(small_disk / "crash.json")["number"] == 4


def test_where_no_file_may_grow_the_report_is_written_into_reserved_room(tmp_path):
    reserve_room(tmp_path)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        write_report(tmp_path / "crash.json", {"number": 1})
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert read_report(tmp_path / "crash.json")["number"] == 1


@pytest.mark.parametrize("limit", [65536, 16384, 4096, 1024])
@pytest.mark.parametrize("reserved", [False, True])
def test_a_limit_on_the_size_of_files_leaves_as_much_of_a_report_as_it_allows(
    tmp_path, limit, reserved
):
    report = {"cause": "exception", "pid": 1, "host": "a" * 30, "boot": "b" * 36}
    error = {"type": "ValueError", "message": "m" * 99_999, "traceback": ["line " * 99] * 999}
    report |= {"error": error, "metrics": {str(number): 0.5 for number in range(9999)}}
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if reserved:
            reserve_room(tmp_path)
        write_report(tmp_path / "crash.json", report)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    found = read_report(tmp_path / "crash.json")
    assert found["cause"] == "exception"
    assert found["boot"] == "b" * 36
    assert found["error"]["message"].startswith("m" * 64)


def test_room_is_given_back(tmp_path):
    reserve_room(tmp_path)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) >= 3 * 65536
    write_report(tmp_path / "crash.json", {"number": 1})
    release_room(tmp_path)
    assert list(contents(tmp_path)) == ["crash.json"]
    assert json.loads(contents(tmp_path)["crash.json"]) == {"schema": 1, "number": 1}


class TestSettingAside:
    def test_keeps_the_latest_and_counts_on(self, tmp_path):
        path = tmp_path / "crash.json"
        for number in range(95):
            write_report(path, {"number": number})
            assert set_aside(path) == tmp_path / f"crash.json.{number + 1}"
            assert not path.exists()
        kept = [json.loads(aside.read_text())["number"] for aside in asides(path)]
        assert kept == list(range(95 - KEPT_ASIDE, 95))

    def test_never_removes_a_file_of_somebody_else_that_has_such_a_name(self, tmp_path):
        (tmp_path / "crash.json.1").write_text("of the user")
        for number in range(2 * KEPT_ASIDE):
            write_report(tmp_path / "crash.json", {"number": number})
            set_aside(tmp_path / "crash.json")
        assert (tmp_path / "crash.json.1").read_text() == "of the user"
        assert len(asides(tmp_path / "crash.json")) == KEPT_ASIDE + 1

    def test_of_nothing_is_nothing(self, tmp_path):
        assert set_aside(tmp_path / "crash.json") is None
        assert contents(tmp_path) == {}

    def test_leaves_files_alone_whose_names_only_begin_alike(self, tmp_path):
        others = {"crash.json.gz": "a", "crash.json.1.gz": "b", "crash.jsonl": "c"}
        for name, text in others.items():
            (tmp_path / name).write_text(text)
        for number in range(20):
            (tmp_path / "crash.json").write_text(str(number))
            set_aside(tmp_path / "crash.json")
        assert others.items() <= contents(tmp_path).items()

    def test_by_several_processes_at_once_replaces_no_file(self, tmp_path):
        processes, each = 5, KEPT_ASIDE // 5
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for attempt in range(20):
                path = tmp_path / str(attempt) / "history.jsonl"
                texts = [str(number).encode() for number in range(processes * each)]
                pool.starmap(write_aside, [(path, text) for text in texts], chunksize=1)
                assert sorted(aside.read_bytes() for aside in asides(path)) == sorted(texts)
                assert len(contents(path.parent)) == len(texts)

    def test_of_the_same_file_by_several_processes_has_one_winner(self, tmp_path):
        with multiprocessing.get_context("fork").Pool(4) as pool:
            for number in range(50):
                path = tmp_path / str(number) / "crash.json"
                path.parent.mkdir()
                path.write_text("x")
                results = pool.map(set_aside, [path] * 4, chunksize=1)
                (winner,) = [result for result in results if result]
                assert contents(path.parent) == {winner.name: "x"}

    @pytest.mark.parametrize("links", [True, False])
    def test_for_a_new_version_has_one_or_the_other_in_place_at_any_moment(
        self, tmp_path, monkeypatch, links
    ):
        path, seen = tmp_path / "config.yaml", []

        def look(event, _):
            if event.startswith("os.") or event == "open":
                seen.append(path.exists() and path.read_bytes() in (b"old", b"new"))

        def no_link(*_):
            raise PermissionError

        if not links:
            monkeypatch.setattr(os, "link", no_link)
        path.write_text("old")
        busy = []

        def hook(event, arguments):
            if watching and not busy:
                busy.append(True)
                look(event, arguments)
                busy.clear()

        watching = True
        sys.addaudithook(hook)
        replace_keeping(path, b"new")
        watching = False
        assert seen
        assert all(seen)
        assert contents(tmp_path) == {"config.yaml": "new", "config.yaml.1": "old"}

    def test_of_parts_is_whole_or_not_at_all(self, small_disk):
        path = small_disk / "history.jsonl"
        path.write_text("rows")
        fill(small_disk)
        before = contents(small_disk)
        with pytest.raises(OSError, match="No space"):
            write_aside(path, bytes(100_000))
        assert contents(small_disk) == before
        (small_disk / "ballast").unlink()
        assert write_aside(path, b"late rows") == small_disk / "history.jsonl.1"
        assert contents(small_disk) == {"history.jsonl": "rows", "history.jsonl.1": "late rows"}
