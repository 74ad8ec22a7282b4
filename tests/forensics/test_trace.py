"""Reading traces: against torch's own sums, packed or not, whole or torn."""

import gzip
import random

import pytest
import torch

from esper_lightning.callbacks.operator_table import operator_table, operator_times
from esper_lightning.forensics.trace import summarize


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
