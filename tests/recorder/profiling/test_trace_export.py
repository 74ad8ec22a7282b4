"""A window becomes one whole file, or none."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from esper_lightning.recorder.profiling import trace_export
from esper_lightning.recorder.profiling.trace_export import export_trace


@pytest.fixture
def profile():
    with torch.profiler.profile() as profile:
        torch.special.erfcx(torch.ones(2))
    return profile


def names(path) -> set[str]:
    return {
        event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    }


def full(*_):
    raise OSError("No space left on device")


def test_the_file_is_all_that_is_left(profile, tmp_path):
    (path,) = export_trace(profile, tmp_path / "a.pt.trace.json.gz")
    assert "aten::special_erfcx" in names(path)
    assert list(tmp_path.iterdir()) == [path]


def test_where_there_is_no_room_for_the_plain_file_too_it_is_packed_as_it_is_written(
    profile, tmp_path, monkeypatch
):
    monkeypatch.setattr(trace_export.shutil, "copyfileobj", full)
    (path,) = export_trace(profile, tmp_path / "a.pt.trace.json.gz")
    assert "aten::special_erfcx" in names(path)
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_put_in_place_at_once_or_not_at_all(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        export_trace(profile, tmp_path / "a.pt.trace.json.gz")
    assert list(tmp_path.iterdir()) == []


def test_a_session_that_somebody_else_ended_has_no_trace(tmp_path):
    with pytest.raises(ValueError, match="holds no result"):
        export_trace(torch.profiler.profile(), tmp_path / "a.pt.trace.json.gz")
