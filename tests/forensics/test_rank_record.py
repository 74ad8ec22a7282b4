"""The record of a rank's process survives writing, damage and other versions."""

import dataclasses
import json

import pytest

from esper_lightning.forensics.rank_record import ProcessRecord, RankRecord, same_recording

WHOLE = ProcessRecord(
    pid=3, host="a", rank=1, world_size=2, started_s=5.0, run="x", state="running"
)


def test_a_record_is_read_as_it_was_written(tmp_path):
    WHOLE.write(tmp_path / "process.json")
    assert ProcessRecord.read(tmp_path / "process.json") == WHOLE
    assert json.loads(WHOLE.to_json()) == WHOLE.to_dict()
    assert next(iter(WHOLE.to_dict())) == "schema"


def test_entries_of_other_versions_stay_and_wrong_ones_are_absent():
    found = ProcessRecord.from_dict({"saved": True, "rank": "one", "new": [1], "started_s": 1e300})
    assert found.evidence_saved is True
    assert (found.rank, found.started_s) == (None, None)
    assert found.to_dict()["new"] == [1]


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "\0"])
def test_a_damaged_file_is_no_record(tmp_path, content):
    path = tmp_path / "process.json"
    assert ProcessRecord.read(path) is None
    path.write_text(content)
    assert ProcessRecord.read(path) is None
    with pytest.raises(ValueError):  # noqa: PT011 - the reason differs
        ProcessRecord.load(path)


def test_the_files_of_a_rank_share_what_names_it():
    shared = RankRecord(**WHOLE.of_rank())
    assert same_recording(shared, WHOLE)
    assert not same_recording(dataclasses.replace(shared, started_s=6.0), WHOLE)
    assert not same_recording(dataclasses.replace(shared, pid=4), WHOLE)
    assert same_recording(dataclasses.replace(shared, started_s=None), WHOLE)
