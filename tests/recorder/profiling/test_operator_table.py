"""The table of a window: its rows, their order and their units."""

from types import SimpleNamespace

import pytest
from torch._C._autograd import DeviceType

from esper_lightning.recorder.profiling.operator_table import (
    OperatorTime,
    operator_table,
    operator_times,
)

MS = 1_000_000  # nanoseconds


def event(name, start, duration, *, thread=1, device=DeviceType.CPU):
    values = {
        "name": name,
        "start_ns": int(start * MS),
        "duration_ns": int(duration * MS),
        "start_thread_id": thread,
        "device_type": device,
    }
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def results(*events):
    return SimpleNamespace(events=lambda: list(events))


RECORDED = results(
    event("outer", 0, 10),
    event("inner", 1, 6),
    event("inner", 8, 1),
    event("elsewhere", 2, 5, thread=2),
    event("kernel", 3, 4, device=DeviceType.CUDA),
    event("kernel", 8, 2, device=DeviceType.CUDA),
)


def test_self_time_is_without_what_is_nested_on_the_same_thread_and_ranks():
    host, device = operator_times(RECORDED)
    assert host == [
        OperatorTime("inner", 7 * MS, 7 * MS, 2),
        OperatorTime("elsewhere", 5 * MS, 5 * MS, 1),
        OperatorTime("outer", 3 * MS, 10 * MS, 1),
    ]
    assert device == [OperatorTime("kernel", 6 * MS, 6 * MS, 2)]


def test_rows_have_shares_sums_and_means_in_units_that_fit():
    lines = [line.split() for line in operator_table(RECORDED).splitlines()]
    rows = {line[0]: line[1:] for line in lines if line}
    assert rows["inner"] == ["46.67%", "7.000ms", "46.67%", "7.000ms", "3.500ms", "2"]
    assert rows["outer"] == ["20.00%", "3.000ms", "66.67%", "10.000ms", "10.000ms", "1"]
    assert rows["kernel"] == ["100.00%", "6.000ms", "100.00%", "6.000ms", "3.000ms", "2"]
    assert "Self CPU time total: 15.000ms" in operator_table(RECORDED)


def test_a_name_that_is_no_text_costs_no_table():
    def name():
        raise UnicodeDecodeError("utf-8", b"\x9a", 0, 1, "invalid start byte")

    odd = event("op", 0, 3)
    odd.name = name
    assert "(a name that is no text)" in operator_table(results(odd, event("op", 4, 1)))


@pytest.mark.parametrize(
    ("duration", "text"),
    [(0.0005, "0.500us"), (1, "1.000ms"), (999, "999.000ms"), (1000, "1.000s")],
)
def test_durations(duration, text):
    assert text in operator_table(results(event("op", 0, duration)))


def test_the_table_is_bounded_and_says_what_all_took():
    many = results(*(event(f"op{i}", 100 * i, 1 + i) for i in range(30)))
    lines = operator_table(many, row_limit=2).splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["op29", "op28"]
    assert lines[5].startswith("---")
    assert lines[6] == "Self CPU time total: 465.000ms"
