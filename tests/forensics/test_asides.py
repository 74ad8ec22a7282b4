"""Files of an earlier run stay beside the files of a new run."""

import multiprocessing
import os
import sys

import pytest

from esper_lightning.forensics import asides as asides_module
from esper_lightning.forensics.asides import KEPT_ASIDE, rename_aside, replace_keeping, write_aside
from tests.disks import fill
from tests.reports import read_report, write_report


def contents(folder):
    """Texts of the files in a folder, without the list of those that were set aside."""
    files = (path for path in folder.iterdir() if path.name != ".set_aside")
    return {path.name: path.read_text() for path in files}


def asides(path):
    return sorted(path.parent.glob(f"{path.name}.*"), key=lambda aside: int(aside.suffix[1:]))


class TestSettingAside:
    def test_keeps_the_latest_and_counts_on(self, tmp_path):
        path = tmp_path / "crash.json"
        for number in range(95):
            write_report(path, {"number": number})
            assert rename_aside(path) == tmp_path / f"crash.json.{number + 1}"
            assert not path.exists()
        kept = [read_report(aside)["number"] for aside in asides(path)]
        assert kept == list(range(95 - KEPT_ASIDE, 95))

    def test_never_removes_a_file_of_somebody_else_that_has_such_a_name(self, tmp_path):
        (tmp_path / "crash.json.1").write_text("of the user")
        for number in range(2 * KEPT_ASIDE):
            write_report(tmp_path / "crash.json", {"number": number})
            rename_aside(tmp_path / "crash.json")
        assert (tmp_path / "crash.json.1").read_text() == "of the user"
        assert len(asides(tmp_path / "crash.json")) == KEPT_ASIDE + 1

    @pytest.mark.parametrize(
        "name", ["config.yaml", "last.ckpt", "best.ckpt", "history.jsonl", "crash.json"]
    )
    def test_removes_what_it_renamed_and_nothing_else(self, tmp_path, name):
        path = tmp_path / name
        theirs = {f"{name}.{number}": "mine" for number in (1, 4, 20251231)}
        for own, text in theirs.items():
            (tmp_path / own).write_text(text)
        for number in range(2 * KEPT_ASIDE):
            path.write_text(f'{{"schema": {number}}}')
            aside = rename_aside(path)
            if number == 3:
                aside.write_text("a run wrote it, and the user made it their own")
                changed = {aside.name: aside.read_text()}
            if number == 5:
                copy = aside.with_name(f"{name}.7")
                copy.write_bytes(aside.read_bytes())
                os.utime(copy, ns=(0, aside.stat().st_mtime_ns))
        found = contents(tmp_path)
        assert (theirs | changed).items() <= found.items()
        assert copy.exists()
        assert len(found) == len(theirs) + len(changed) + 1 + KEPT_ASIDE

    def test_without_its_list_keeps_every_file(self, tmp_path):
        """As after a kill between the new name and its entry, or in a directory copied here."""
        for number in range(2 * KEPT_ASIDE):
            (tmp_path / "config.yaml").write_text(str(number))
            rename_aside(tmp_path / "config.yaml")
            (tmp_path / ".set_aside").unlink()
        assert len(asides(tmp_path / "config.yaml")) == 2 * KEPT_ASIDE

    def test_has_a_list_that_does_not_grow_for_ever(self, tmp_path, monkeypatch):
        monkeypatch.setattr(asides_module, "_MOST_ENTRIES", 30)
        for number in range(100):
            for name in ("config.yaml", "last.ckpt"):
                (tmp_path / name).write_text(str(number))
                rename_aside(tmp_path / name)
        assert len((tmp_path / ".set_aside").read_text().splitlines()) <= 31
        assert len(contents(tmp_path)) == 2 * KEPT_ASIDE

    def test_of_nothing_is_nothing(self, tmp_path):
        assert rename_aside(tmp_path / "crash.json") is None
        assert contents(tmp_path) == {}

    def test_leaves_files_alone_whose_names_only_begin_alike(self, tmp_path):
        others = {"crash.json.gz": "a", "crash.json.1.gz": "b", "crash.jsonl": "c"}
        for name, text in others.items():
            (tmp_path / name).write_text(text)
        for number in range(20):
            (tmp_path / "crash.json").write_text(str(number))
            rename_aside(tmp_path / "crash.json")
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
                results = pool.map(rename_aside, [path] * 4, chunksize=1)
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

    @pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
    def test_renames_what_is_no_file_and_has_no_copy(self, tmp_path, make):
        path = tmp_path / "config.yaml"
        make(path)
        replace_keeping(path, b"new")
        assert path.read_bytes() == b"new"
        assert not path.with_name("config.yaml.1").is_file()
        assert os.path.lexists(path.with_name("config.yaml.1"))

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


def test_no_renamed_file_is_replaced(tmp_path):
    path, aside = tmp_path / "crash.json", []
    assert rename_aside(path) is None
    for number in range(3):
        path.write_text(str(number))
        aside.append(rename_aside(path))
    assert [found.name for found in aside] == ["crash.json.1", "crash.json.2", "crash.json.3"]
    assert [found.read_text() for found in aside] == ["0", "1", "2"]
    assert not path.exists()
