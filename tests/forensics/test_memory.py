"""Memory of a process, and what limits and the OOM killer's counters say about it."""

import os

import pytest

from esper_lightning.forensics.memory import Memory, measure_memory, oom_kills


def test_counters_of_both_cgroup_versions(tmp_path):
    (tmp_path / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert oom_kills(os.getpid(), tmp_path).items() >= {"oom": 2, "oom_kill": 1}.items()
    (tmp_path / "memory.events").write_text("torn\n")
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\noom_kill 5\n")
    assert oom_kills(os.getpid(), tmp_path)["oom_kill"] == 5


def test_without_a_group_the_limit_is_the_memory_of_the_machine(tmp_path):
    memory = measure_memory(root=tmp_path)
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    assert abs(memory.limit_bytes - pages * size) < 0.1 * memory.limit_bytes
    assert 0 < memory.rss_bytes <= memory.peak_bytes < memory.limit_bytes
    assert 0 < memory.available_bytes < memory.limit_bytes


@pytest.mark.parametrize(
    ("limit", "usage", "cache"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_the_limit_of_a_group_counts_and_caches_do_not(tmp_path, limit, usage, cache):
    for name, content in {
        limit: 1_000_000,
        usage: 990_000,
        "memory.stat": f"{cache} 390000",
    }.items():
        (tmp_path / name).write_text(f"{content}\n")
    memory = measure_memory(root=tmp_path)
    assert (memory.limit_bytes, memory.available_bytes) == (1_000_000, 400_000)
    assert not memory.is_short
    (tmp_path / "memory.stat").write_text(f"{cache} 10000\n")
    assert measure_memory(root=tmp_path).is_short
    (tmp_path / limit).write_text("max\n")
    assert measure_memory(root=tmp_path).limit_bytes > 1_000_000


def test_of_a_process_that_is_gone_nothing_is_known():
    assert measure_memory(1 << 22) is None


def test_memory_in_words():
    text = Memory(1_500_000_000, 2_000_000_000, 4_000_000_000, 10_000_000).in_words
    assert text == "it had 1.50 GB, at most 2.00 GB; 0.01 GB of 4.00 GB were left"
