"""Reading traces: against torch's own sums, packed or not, whole or torn."""

import gzip
import itertools
import json
import random
import subprocess
import sys

import pytest
import torch

from esper_lightning.forensics.trace import sum_nested, summarize
from esper_lightning.recorder.profiling.operator_table import operator_table, operator_times

MEASURED = """
import re, sys
from pathlib import Path
from esper_lightning.forensics.trace import summarize
summary = summarize(Path(sys.argv[1]))
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(summary.events, summary.complete, summary.operators[0].calls, summary.last[-1].name, peak)
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A profile and its trace."""
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    with torch.profiler.profile() as profile:
        for _ in range(5):
            with torch.profiler.record_function("my span"):
                layer(torch.randn(16, 8)).sum().backward()
    path = tmp_path_factory.mktemp("trace") / "a.pt.trace.json"
    profile.export_chrome_trace(str(path))
    return profile, path


def oracle(profile):
    return {
        row.key: (row.self_cpu_time_total, row.cpu_time_total, row.count)
        for row in profile.key_averages()
        if not row.key.startswith("[")
    }


def test_agrees_with_key_averages(recorded):
    profile, path = recorded
    summary = summarize(path, top=1000)
    assert summary.complete
    assert summary.duration_s > 0
    found = {row.name: row for row in (*summary.operators, *summary.spans)}
    for name, (own, total, calls) in oracle(profile).items():
        assert found[name].calls == calls
        assert found[name].total_us == pytest.approx(total, abs=0.01 * calls)
        assert found[name].self_us == pytest.approx(own, abs=0.02 * calls + 1)
    assert [row.name for row in summary.spans] == ["my span"]
    ends = [operator.start_us for operator in summary.last]
    assert ends == sorted(ends)
    assert len(ends) == 15


def test_the_table_agrees_with_key_averages(recorded):
    profile, _ = recorded
    host, device = operator_times(profile.profiler.kineto_results)
    assert device == []
    found = {row.name: row for row in host}
    for name, (own, total, calls) in oracle(profile).items():
        assert found[name].calls == calls
        assert found[name].total_ns / 1e3 == pytest.approx(total, abs=0.01 * calls)
        assert found[name].self_ns / 1e3 == pytest.approx(own, abs=0.02 * calls + 1)
    table = operator_table(profile.profiler.kineto_results, row_limit=3)
    assert table.count("\n") == 8
    assert "Self CPU time total" in table


def test_packed_is_the_same(recorded, tmp_path):
    _, path = recorded
    packed = tmp_path / "a.pt.trace.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert summarize(packed) == summarize(path)


def test_a_torn_trace_is_read_as_far_as_it_goes(recorded, tmp_path):
    _, path = recorded
    whole, content = summarize(path), path.read_bytes()
    packed = gzip.compress(content)
    last_event = content.rindex(b'"ph": "X"')
    for cut in random.Random(0).sample(range(last_event), 30):
        torn = tmp_path / "torn.json"
        torn.write_bytes(content[:cut])
        summary = summarize(torn)
        assert not summary.complete
        assert summary.events <= whole.events
        torn = tmp_path / "torn.json.gz"
        torn.write_bytes(packed[: cut * len(packed) // len(content)])
        assert not summarize(torn).complete


@pytest.mark.parametrize(
    "damage",
    [pytest.param(b"", marks=pytest.mark.slow), b"\0", pytest.param(b'"', marks=pytest.mark.slow)],
)
def test_memory_is_bounded(tmp_path, damage):
    """A trace of thirty megabytes, where a damaged byte costs one event or two."""
    path, events, width = tmp_path / "large.pt.trace.json", 100_000, 300
    with path.open("wb") as file:
        file.write(b'{"schemaVersion": 1, "traceEvents": [\n')
        for i in range(events):
            text = json.dumps({"ph": "X", "cat": "cpu_op", "name": "op", "ts": i, "dur": 0.5})
            file.write(text.ljust(width).encode() + b",\n")
        file.write(b'{"ph": "X", "cat": "cpu_op", "name": "last", "ts": 1e6, "dur": 1}]}')
        if damage:
            file.seek(40 + (width + 2) * (events // 2))
            file.write(damage)
    command = [sys.executable, "-c", MEASURED, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found, complete, calls, last, peak_kb = result.stdout.split()
    assert complete == str(not damage)
    assert events - 2 * bool(damage) <= int(calls) == int(found) - 1 <= events
    assert last == "last"
    assert int(peak_kb) < 40_000


def test_reads_on_behind_damage(recorded, tmp_path):
    _, path = recorded
    content, chance = path.read_bytes(), random.Random(0)
    whole, damaged = summarize(path), tmp_path / "damaged.json"
    for _ in range(50):
        spoiled = bytearray(content)
        at = chance.randrange(content.index(b'"ph": "X"'), content.rindex(b'"ph": "X"'))
        spoiled[at : at + 4] = chance.randbytes(4)
        damaged.write_bytes(spoiled)
        assert whole.events - 3 <= summarize(damaged).events <= whole.events + 3


def test_a_trace_that_is_damaged_throughout_takes_no_longer(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"traceEvents": [' + b'{"ph": "X", "name": "\\x"},' * 100_000 + b"]}")
    summary = summarize(path)
    assert (summary.events, summary.complete) == (0, False)


@pytest.mark.parametrize("text", ["", "null", '{"traceEvents": null}', '{"traceEvents": [[[[', "{"])
def test_what_holds_no_events(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    summary = summarize(path)
    assert (summary.events, summary.complete) == (0, False)


def test_operators_are_summed_apart_from_python_frames_and_cuda_calls(tmp_path):
    """Which kineto writes behind the operators, not in order of time."""
    kinds = [("cpu_op", "op"), ("python_function", "frame"), ("cuda_runtime", "launch")]
    events = [
        {"ph": "X", "cat": kind, "name": name, "ts": 10 * i, "dur": 5 if kind == "cpu_op" else 2}
        for (kind, name), i in itertools.product(kinds, range(3000))
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"traceEvents": events}))
    summary = summarize(path)
    rows = {row.name: row[1:] for row in summary.operators}
    assert rows == {"op": (15000, 15000, 3000), "launch": (6000, 6000, 3000)}
    assert summary.device_operators == []


def written(path, *events):
    kind = {"ph": "X", "cat": "cpu_op", "tid": 1}
    named = [{**kind, "name": name, "ts": start, "dur": length} for name, start, length in events]
    path.write_text(json.dumps({"traceEvents": named}))
    return path


def test_self_time_is_without_what_is_nested_and_not_without_what_follows_at_once(tmp_path):
    events = [("inner", 0, 4), ("outer", 0, 10), ("next", 10, 5), ("inner", 10, 2), ("last", 15, 1)]
    rows = {row.name: row[1:] for row in summarize(written(tmp_path / "a.json", *events)).operators}
    assert rows == {"outer": (6, 10, 1), "inner": (6, 6, 2), "next": (3, 5, 1), "last": (1, 1, 1)}
    names = [*rows]
    sums = [[0.0, 0.0, 0] for _ in names]
    places, starts, durations = zip(*events, strict=True)
    sum_nested(starts, durations, [names.index(name) for name in places], sums)
    assert dict(zip(names, map(tuple, sums), strict=True)) == rows


def test_the_last_operators_are_those_that_began_last_wherever_they_are_written(tmp_path):
    events = [(f"op{start}", start, 1) for start in (5, 9, 1, 8, 2, 7, 3, *range(10, 22))]
    summary = summarize(written(tmp_path / "a.json", *events))
    assert [operator.name for operator in summary.last] == [f"op{n}" for n in range(7, 22)]
