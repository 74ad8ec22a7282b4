"""The bundle of a death is small, and ``esper crash`` reads it."""

import os
import zipfile

import pytest

from esper_lightning.cli.main import main
from esper_lightning.forensics import bundle
from esper_lightning.forensics.bundle import write_bundle
from esper_lightning.forensics.files import encode_rows
from esper_lightning.forensics.layout import RunLayout
from tests.reports import write_report


@pytest.fixture
def dead(tmp_path):
    """A run that died, with a checkpoint and a history."""
    run = RunLayout(tmp_path / "run")
    files = run.rank(0)
    files.directory.mkdir(parents=True)
    run.checkpoints.mkdir()
    run.last_checkpoint.write_bytes(b"weights")
    files.crash_checkpoint.write_bytes(b"weights")
    run.config.write_text("model: {seed: 0}\n")
    files.history.write_bytes(encode_rows([{"iteration": 1, "env_steps": 32}]))
    error = {"type": "ValueError", "message": "too windy", "traceback": []}
    report = {"rank": 0, "time_s": 1.0, "cause": "exception", "error": error, "complete": True}
    write_report(files.crash, report)
    return run


def names(path):
    with zipfile.ZipFile(path) as file:
        return set(file.namelist())


def test_what_is_unpacked_is_read_by_esper_crash(dead, tmp_path, capsys):
    path = write_bundle(dead.directory)
    assert path == dead.crash_bundle
    assert names(path) == {"config.yaml", "rank0/crash.json", "rank0/history.jsonl"}
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path / "elsewhere")
    main(["crash", str(tmp_path / "elsewhere")])
    assert "ValueError: too windy" in capsys.readouterr().out


def test_without_a_death_there_is_no_bundle(dead):
    dead.rank(0).crash.unlink()
    assert write_bundle(dead.directory) is None
    assert not dead.crash_bundle.exists()


def test_a_later_death_has_a_bundle_of_its_own(dead):
    write_bundle(dead.directory)
    dead.rank(0).stacks.write_text("later")
    write_bundle(dead.directory)
    assert "rank0/stacks.txt" not in names(dead.crash_bundle)  # the death is the same
    later = dead.crash_bundle.stat().st_mtime + 1
    os.utime(dead.rank(0).crash, (later, later))
    write_bundle(dead.directory)
    assert "rank0/stacks.txt" in names(dead.crash_bundle)


def test_a_large_file_displaces_no_small_one(dead, monkeypatch):
    monkeypatch.setattr(bundle, "_MOST_BYTES", 5_000)
    dead.rank(0).trace.mkdir()
    (dead.rank(0).trace / "a.pt.trace.json").write_bytes(bytes(5_000))
    assert "rank0/crash.json" in names(write_bundle(dead.directory))
    assert "rank0/trace/a.pt.trace.json" not in names(dead.crash_bundle)
