"""The checkpoints from which a replay can start; ``tests/test_replaying.py`` has whole replays."""

import os
import tempfile
from types import SimpleNamespace

import pytest
import torch

from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.report import CrashReport
from esper_lightning.training.checkpoint import replay_starts


def test_a_run_directory_may_have_a_name_that_is_a_pattern(tmp_path, monkeypatch):
    before = RunLayout(tmp_path / "replay_of_lr[0.1]").before_fault
    before.parent.mkdir(parents=True)
    before.touch()
    monkeypatch.setattr(replay_starts, "_went_alike", lambda *_: True)
    assert list(replay_starts._candidates(tmp_path / "lr[0.1]", (), None)) == [before]


def store(path, iteration, *, epoch_ends):
    progress = {"total": {"processed": iteration}, "is_last_batch": epoch_ends}
    torch.save({"loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}, path)
    return path


@pytest.mark.parametrize("resumed_from", [None, "gone.ckpt"])
def test_a_start_without_the_order_of_the_data_is_the_last_resort(tmp_path, resumed_from):
    folder = RunLayout(tmp_path).checkpoints
    folder.mkdir()
    middle = store(folder / "middle.ckpt", 9, epoch_ends=False)
    report = CrashReport(iteration=10)
    dead = SimpleNamespace(
        resumed_from=resumed_from, started_s=1.0, report=report, rank=0, directory=tmp_path
    )
    files = RunLayout(tmp_path).rank(0)
    files.directory.mkdir()
    files.history.write_text('{"iteration": 7}\n')
    # The beginning has the order, where it is still there.
    assert replay_starts.find_starts((tmp_path,), (dead,), dead) == (
        {middle: 9} if resumed_from else {}
    )
    end = store(folder / "end.ckpt", 6, epoch_ends=True)
    assert replay_starts.find_starts((tmp_path,), (dead,), dead) == {end: 6}


def test_folders_that_killed_replays_have_left_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, young, other = (tmp_path / name for name in ("esper-replay-a", "esper-replay-b", "c"))
    for folder in (left, young, other):
        folder.mkdir()
        (folder / "state.ckpt").touch()
    with replay_starts.temporary_folder() as used:
        for folder in (left, other, used):
            os.utime(folder, (0, 0))
        with replay_starts.temporary_folder():
            assert not left.exists()
            assert young.is_dir()
            assert used.is_dir()
            assert other.is_dir()
    assert {each.name for each in tmp_path.iterdir()} == {young.name, other.name}
