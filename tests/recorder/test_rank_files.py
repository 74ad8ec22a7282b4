"""The files of a rank are opened even where the disk refuses one, and all are closed."""

import contextlib
import logging

import pytest

from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.phases import read_phases
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.recorder import rank_files as module
from esper_lightning.recorder.earlier_evidence import EarlierEvidence
from esper_lightning.recorder.rank_files import open_rank_files


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path / "run")


@pytest.fixture
def opened(make_trainer, layout):
    trainer = make_trainer()

    def opened():
        return open_rank_files(trainer, layout, undo, met=(), watch=False, trains=True)

    with contextlib.ExitStack() as undo:
        yield opened


def test_the_rank_is_on_record_as_running(opened, layout):
    found = opened()
    assert ProcessRecord.read(layout.rank(0).process).state == "running"
    found.ring.enter("rollout")
    assert [span.name for span in read_phases(layout.rank(0).phases).open] == ["rollout"]


@pytest.mark.parametrize(("owner", "name"), [(EarlierEvidence, "rename"), (module, "reserve_room")])
def test_a_file_that_the_disk_refuses_costs_no_other_and_one_warning(
    opened, layout, monkeypatch, caplog, owner, name
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    with caplog.at_level(logging.WARNING):
        opened()
    assert ProcessRecord.read(layout.rank(0).process).state == "running"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "does not take every file" in warning
    assert "No space left on device" in warning


def test_a_folder_that_cannot_be_made_is_an_error(opened, layout):
    layout.directory.write_text("a file")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        opened()
