"""Where the time of a recorded window went, as ``key_averages`` shows it, without its cost.

``torch.profiler.profile.key_averages`` builds an object for every event of the window, which takes
about a second for each recorded iteration of PPO.
"""

from collections import defaultdict
from typing import Any, NamedTuple

from torch._C._autograd import DeviceType

__all__ = ["OperatorTime", "operator_table", "operator_times"]


class OperatorTime(NamedTuple):
    """Of all events of one name; in nanoseconds."""

    name: str
    self_ns: int
    total_ns: int
    calls: int


def operator_times(results: Any) -> tuple[list[OperatorTime], list[OperatorTime]]:
    """Times by name on the CPU and on devices, longest self time first.

    An event's self time is its duration without that of the events nested in it on its thread.

    Args:
        results: ``kineto_results`` of a stopped profiler.
    """
    host: list[tuple[int, int, int, str]] = []
    device: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for event in results.events():
        duration = event.duration_ns()
        if event.device_type() == DeviceType.CPU:
            host.append((event.start_thread_id(), event.start_ns(), -duration, event.name()))
        else:
            _add(device[event.name()], duration, duration)
    host.sort()
    times: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    open_events: list[tuple[int, int, str]] = []  # thread, end, name
    for thread, start, negative, name in host:
        while open_events and (open_events[-1][0] != thread or open_events[-1][1] <= start):
            open_events.pop()
        if open_events and start - negative <= open_events[-1][1]:
            times[open_events[-1][2]][0] += negative
        _add(times[name], -negative, -negative)
        open_events.append((thread, start - negative, name))
    return _ranked(times), _ranked(device)


def operator_table(results: Any, *, row_limit: int = 20) -> str:
    """A table of the operators that took most time, with the column heads of torch's own.

    Args:
        results: ``kineto_results`` of a stopped profiler.
        row_limit: Rows for the CPU, and as many for devices.
    """
    host, device = operator_times(results)
    lines = _rows(host, "CPU", row_limit)
    if device:
        lines += ["", *_rows(device, "Device", row_limit)]
    return "\n".join(lines) + "\n"


def _add(entry: list[int], self_ns: int, total_ns: int) -> None:
    entry[0] += self_ns
    entry[1] += total_ns
    entry[2] += 1


def _ranked(times: dict[str, list[int]]) -> list[OperatorTime]:
    rows = [OperatorTime(name, *entry) for name, entry in times.items()]
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
