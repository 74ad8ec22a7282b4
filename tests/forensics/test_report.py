"""Reports are restored as they were written, and every field is explained."""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_lightning.forensics import fingerprint, processes, rank_record, records, report
from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.memory import Memory
from esper_lightning.forensics.rank_record import ProcessRecord, RankRecord
from esper_lightning.forensics.records import EpochSeconds, Record
from esper_lightning.forensics.report import CrashReport, Evidence, MemoryReport

RECORDS = [
    found
    for module in (records, processes, fingerprint, rank_record, report)
    for found in vars(module).values()
    if isinstance(found, type) and issubclass(found, Record) and found.__module__ == module.__name__
]
FILES = pytest.mark.parametrize("kind", [CrashReport, ProcessRecord])
RUNS = Path(__file__).parents[1] / "fixtures" / "runs"

SCHEMA_1 = {
    "schema": 1,
    "rank": 0,
    "world_size": 2,
    "pid": 71,
    "host": "a",
    "start_ticks": 8,
    "boot": "5f1c",
    "pid_namespace": 4,
    "started_s": 1.7e9,
    "run": "9f3c",
    "event_files": ["events.out.tfevents.1"],
    "time_s": 1.7e9,
    "cause": "exception",
    "error": {
        "type": "ValueError",
        "message": "no",
        "traceback": ["a", "b"],
        "non_finite": {"phase": "rollout", "tensors": ["reward"], "environments": [1]},
    },
    "signal": "SIGTERM",
    "exit_status": 143,
    "peer": {"rank": 1, "reason": "it failed"},
    "stage": "fit",
    "iteration": 12,
    "global_step": 12,
    "epoch": 0,
    "env_steps": 64,
    "gradient_steps": 8,
    "phases": ["update"],
    "metrics": {"loss": 0.1},
    "profiler": {"class": "PyTorchProfiler", "action": "RECORD", "dirpath": "/there"},
    "evidence": {"history": {"state": "saved", "path": "history.jsonl", "detail": "12 rows"}},
    "cgroup": {"before": {"oom_kill": 0}, "after": {"oom_kill": 1}},
    "memory": {"rss_bytes": 1, "peak_bytes": 1, "limit_bytes": 9, "available_bytes": 8},
    "duration_s": 0.3,
    "complete": True,
    "versions": {"torch": "2.13.0"},
    "written_by": "sidecar",
}
"""Keys that every version writes under these names."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
plain = {
    int: st.integers(-(10**16), 10**17),
    str: st.text(),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    type(None): st.none(),
    EpochSeconds: st.floats(0, 1e10),
}


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field of a record may have."""
    kind, of = get_origin(hint), get_args(hint)
    if hint in plain:
        return plain[hint]
    if kind is tuple:
        return st.lists(of_type(of[0]), max_size=3).map(tuple)
    if kind is Mapping:
        return st.dictionaries(st.text(), of_type(of[1]), max_size=3)
    if kind is not None:
        return st.one_of([of_type(choice) for choice in of])
    hints = get_type_hints(hint, include_extras=True)
    return st.builds(
        hint,
        **{name: of_type(hints[name]) for name in names(hint) if name != "unknown"},
        unknown=st.dictionaries(st.text().map("x{}".format), st.integers(0, 9), max_size=2),
    )


def names(kind: type[Record]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def keys(kind: type[Record]) -> list[str]:
    """Keys under which a record's fields are read, those of earlier versions too."""
    fields = dataclasses.fields(kind)
    return [*names(kind), *(key for field in fields for key in field.metadata.values())]


@FILES
@given(st.data())
def test_any_record_is_read_as_it_was_written(tmp_path_factory, kind, data):
    written, path = data.draw(of_type(kind)), tmp_path_factory.getbasetemp() / "any.json"
    written.write(path)
    assert kind.load(path) == written
    assert path.read_bytes() == written.to_json()


@FILES
@given(st.data())
def test_any_json_object_is_a_record(tmp_path_factory, kind, data):
    content = data.draw(st.dictionaries(st.sampled_from(keys(kind)) | st.text(), json_values))
    path = tmp_path_factory.getbasetemp() / "some.json"
    write_atomically(path, json.dumps(content).encode())
    found = kind.load(path)
    assert kind.from_dict(found.to_dict()).to_dict().keys() == found.to_dict().keys()
    if isinstance(found, CrashReport):
        assert isinstance(found.what_happened, str)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b'{"cause": ', b"\xff\xfe\x00"])
def test_what_is_no_report_is_none(tmp_path, content):
    path = tmp_path / "crash.json"
    assert CrashReport.read(path) is None
    path.write_bytes(content)
    assert CrashReport.read(path) is None


def test_what_is_not_of_its_type_is_absent_and_takes_nothing_with_it():
    odd = {"started_s": "1", "rank": True, "state": ["running"], "pid": 5, "own": [1], "host": None}
    record = ProcessRecord.from_dict(odd | {"event_files": ["a", 1, "b"], "saved": 1})
    assert record == ProcessRecord(
        pid=5, unknown={"own": [1]}, event_files=("a", "b"), schema=None, evidence_saved=None
    )
    odd = {"evidence": {"a": 1, "b": {"state": 1, "path": "p"}}, "memory": [], "complete": None}
    odd |= {"error": {"traceback": "text", "message": "m", "type": 7}, "metrics": {"a": [], "b": 1}}
    found = CrashReport.from_dict(odd)
    assert (found.evidence, found.memory) == ({"b": Evidence(path="p")}, None)
    assert (found.error.type, found.error.message, found.error.traceback) == (None, "m", ())
    assert (found.metrics, found.complete) == ({"b": 1}, False)


@pytest.mark.parametrize("time_s", [-1.0, 1e11, float("nan"), True, "5"])
def test_what_can_be_no_moment_is_absent(time_s):
    assert CrashReport.from_dict({"time_s": time_s}).time_s is None


def test_keys_of_an_earlier_version_are_read(tmp_path):
    path = tmp_path / "crash.json"
    path.write_text(json.dumps({"untold": {"phases": "E"}, "module": "PPO", "schema": 1}))
    report = CrashReport.load(path)
    assert (report.failed_fields, report.module_class) == ({"phases": "E"}, "PPO")
    assert not report.unknown
    assert ProcessRecord.from_dict({"saved": True}).evidence_saved is True
    both = {"saved": True, "evidence_saved": False}
    assert ProcessRecord.from_dict(both).evidence_saved is False


@pytest.mark.parametrize("path", sorted(RUNS.glob("*/rank0/*.json")), ids=str)
def test_reports_of_version_0_1_lose_nothing(path):
    kind = CrashReport if path.name == "crash.json" else ProcessRecord
    before, found = json.loads(path.read_bytes()), kind.load(path)
    renamed = {"untold": "failed_fields", "module": "module_class", "saved": "evidence_saved"}
    now = found.to_dict()
    assert not found.unknown
    assert includes(now, {renamed.get(key, key): value for key, value in before.items()})


def test_keys_of_schema_1_stay():
    assert includes(CrashReport.from_dict(SCHEMA_1).to_dict(), SCHEMA_1)
    assert not any(found.unknown for found in within(CrashReport.from_dict(SCHEMA_1)))
    process = {key: SCHEMA_1[key] for key in names(RankRecord) if key != "unknown"}
    process |= {"state": "off", "changed_s": 1.7e9}
    assert includes(ProcessRecord.from_dict(process).to_dict(), process)
    assert not ProcessRecord.from_dict(process).unknown


def within(record: Record) -> list[Record]:
    """A record class and the record classes of its fields."""
    values = [getattr(record, name) for name in names(type(record))]
    values += [entry for value in values if isinstance(value, Mapping) for entry in value.values()]
    return [record, *(x for value in values if isinstance(value, Record) for x in within(value))]


def includes(now: Any, before: Any) -> bool:
    if not isinstance(before, dict):
        return now == before
    return all(key in now and includes(now[key], entry) for key, entry in before.items())


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_field_is_explained_and_nothing_else(kind):
    own = [name for name in kind.__annotations__ if name.islower()]
    section = inspect.cleandoc(kind.__doc__).split("Attributes:\n")[-1]
    assert re.findall(r"^    (\w+): \S", section, re.MULTILINE) == own


def test_nothing_but_fields_is_expendable():
    for kind in (RankRecord, CrashReport):
        assert {key.partition(".")[0] for key in kind.EXPENDABLE} < set(names(kind))


def test_the_memory_in_a_report_is_all_that_is_measured():
    assert set(names(MemoryReport)) == {*Memory._fields, "unknown"}


@pytest.mark.parametrize(
    ("report", "text"),
    [
        ({"error": {"type": "ValueError", "message": "no"}}, "ValueError: no"),
        ({"error": {"type": "KeyboardInterrupt", "message": ""}}, "KeyboardInterrupt"),
        ({"cause": "vanished", "error": {"type": None, "message": "It vanished."}}, "It vanished."),
        ({"cause": "signal", "signal": "SIGTERM"}, "SIGTERM"),
        ({"cause": "hang"}, "hang"),
        ({"cause": "peer", "peer": {"rank": 1, "reason": "it failed"}}, "rank 1: it failed"),
        (
            {"cause": "exception", "error": {"type": "E"}, "peer": {"rank": 1, "reason": "later"}},
            "E",
        ),
        (
            {"cause": "peer", "error": {"type": "PeerFailedError", "message": "x"}},
            "PeerFailedError: x",
        ),
        ({}, ""),
    ],
)
def test_what_ended_a_run_in_a_few_words(report, text):
    assert CrashReport.from_dict(report).what_happened == text
