"""Evidence of an earlier run never passes for that of this run."""

from types import SimpleNamespace

import pytest

from esper_lightning.forensics.asides import KEPT_ASIDE
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.recorder.earlier_evidence import EarlierEvidence


@pytest.fixture
def layout(tmp_path):
    layout = RunLayout(tmp_path)
    files = layout.rank(0)
    files.evidence.mkdir(parents=True)
    layout.rank(1).directory.mkdir()
    files.crash.write_text('{"cause": "exception"}')
    files.stacks.write_text("stacks")
    files.phases.write_text("phases")
    (files.evidence / "a").write_text("a")
    return layout


def names(layout):
    return {path.name for path in layout.rank(0).directory.iterdir() if path.name[0] != "."}


def test_evidence_gets_a_number(layout):
    EarlierEvidence(layout, layout.rank(0), trains=True).rename()
    assert names(layout) == {"crash.json.1", "stacks.txt.1", "evidence.1", "phases.ring"}


@pytest.mark.parametrize(
    ("settings", "is_renamed"),
    [
        ({"trains": True}, True),
        ({"trains": True, "resumes": True}, False),
        ({"trains": False}, False),
    ],
)
def test_the_bundle_of_a_death_is_not_that_of_a_new_run(layout, settings, is_renamed):
    layout.crash_bundle.write_text("zip")
    EarlierEvidence(layout, layout.rank(1), **settings).rename()
    assert layout.crash_bundle.exists()  # the first rank alone renames it
    EarlierEvidence(layout, layout.rank(0), **settings).rename()
    assert layout.crash_bundle.exists() is not is_renamed
    assert (layout.directory / "crash.zip.1").exists() is is_renamed


def test_a_validation_that_ends_well_leaves_everything_as_it_was(layout):
    before = names(layout)
    earlier = EarlierEvidence(layout, layout.rank(0), trains=False)
    earlier.rename()
    assert not names(layout) & before
    layout.rank(0).phases.write_text("of the validation")
    earlier.restore(ProcessRecord(state="finished"))
    assert names(layout) == before
    assert layout.rank(0).phases.read_text() == "phases"


def test_the_latest_folders_of_evidence_are_kept_and_those_of_anybody_else(layout):
    folder = layout.rank(0).evidence
    (folder.with_name("evidence.1")).mkdir()  # somebody else's: without a mark
    for _ in range(KEPT_ASIDE + 2):
        folder.mkdir(exist_ok=True)
        EarlierEvidence(layout, layout.rank(0), trains=True).rename()
    kept = [name for name in names(layout) if name.startswith("evidence.")]
    assert "evidence.1" in kept
    assert len(kept) == KEPT_ASIDE + 1


def test_event_files_of_runs_in_the_directory_are_remembered(layout):
    name, other = "events.out.tfevents.1", "events.out.tfevents.2"
    for each in (name, other):
        (layout.directory / each).touch()
    ProcessRecord(event_files=(name, "../x", "gone")).write(layout.rank(0).process)
    earlier = EarlierEvidence(layout, layout.rank(0), trains=True)
    assert earlier.keep_latest_events(SimpleNamespace(loggers=[])) == [name]
    assert (layout.directory / other).exists()
