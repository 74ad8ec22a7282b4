"""The time of a recorded window by operator, as in ``key_averages``, at a lower cost.

``torch.profiler.profile.key_averages`` builds an object for every event of the window, which takes
about a second for each recorded iteration of PPO.
"""

from array import array
from collections import defaultdict
from typing import Any, NamedTuple

from torch._C._autograd import DeviceType

from esper_lightning.forensics.trace import sum_nested

__all__ = ["OperatorTime", "operator_table", "operator_times"]


class OperatorTime(NamedTuple):
    """Times of all events of one name, in nanoseconds."""

    name: str
    self_ns: int
    total_ns: int
    calls: int


def operator_times(results: Any) -> tuple[list[OperatorTime], list[OperatorTime]]:
    """Times by name on the CPU and on devices, longest self time first.

    An event's self time is its duration without the durations of the events nested in it on its
    thread.

    Args:
        results: ``kineto_results`` of a stopped profiler.

    Returns:
        Times of operators on the CPU, and times on devices.
    """
    names: dict[str, int] = {}
    threads: dict[int, tuple[array[int], array[int], array[int]]] = defaultdict(
        lambda: (array("q"), array("q"), array("q"))  # starts, durations, names
    )
    device: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    for event in results.events():
        duration = event.duration_ns()
        if event.device_type() == DeviceType.CPU:
            starts, durations, identities = threads[event.start_thread_id()]
            starts.append(event.start_ns())
            durations.append(duration)
            identities.append(names.setdefault(_name_of(event), len(names)))
        else:
            entry = device[_name_of(event)]
            entry[:] = [entry[0] + duration, entry[1] + duration, entry[2] + 1]
    sums: list[list[float]] = [[0, 0, 0] for _ in names]
    for columns in threads.values():
        sum_nested(*columns, sums)
    return _ranked(dict(zip(names, sums, strict=True))), _ranked(device)


def _name_of(event: Any) -> str:
    """The name of an event; torch names some Python functions by bytes that are no text."""
    try:
        return event.name()
    except UnicodeDecodeError:
        return "(a name that is no text)"


def operator_table(results: Any, *, row_limit: int = 20) -> str:
    """A table of the operators that took most time, with the column heads of torch's tables.

    Args:
        results: ``kineto_results`` of a stopped profiler.
        row_limit: Greatest number of rows for the CPU, and for devices.
    """
    host, device = operator_times(results)
    lines = _rows(host, "CPU", row_limit)
    if device:
        lines += ["", *_rows(device, "Device", row_limit)]
    return "\n".join(lines) + "\n"


def _ranked(times: dict[str, list[float]]) -> list[OperatorTime]:
    rows = [OperatorTime(name, *map(int, entry)) for name, entry in times.items()]
    return sorted(rows, key=lambda row: -row.self_ns)


def _rows(times: list[OperatorTime], where: str, row_limit: int) -> list[str]:
    whole = sum(row.self_ns for row in times) or 1
    heads = (f"Self {where} %", f"Self {where}", f"{where} total %", f"{where} total")
    heads = (*heads, f"{where} time avg", "# of Calls")
    rule = "-" * 55 + "  " + "  ".join("-" * 14 for _ in heads)
    lines = [rule, f"{'Name':>55}  " + "  ".join(f"{head:>14}" for head in heads), rule]
    for row in times[:row_limit]:
        cells = (
            f"{row.self_ns / whole:.2%}",
            _duration(row.self_ns),
            f"{row.total_ns / whole:.2%}",
            _duration(row.total_ns),
            _duration(row.total_ns / row.calls),
            str(row.calls),
        )
        name = row.name if len(row.name) <= 55 else row.name[:52] + "..."
        lines.append(f"{name:>55}  " + "  ".join(f"{cell:>14}" for cell in cells))
    lines += [rule, f"Self {where} time total: {_duration(whole)}"]
    return lines


def _duration(ns: float) -> str:
    if ns >= 1e9:
        return f"{ns / 1e9:.3f}s"
    return f"{ns / 1e6:.3f}ms" if ns >= 1e6 else f"{ns / 1e3:.3f}us"
