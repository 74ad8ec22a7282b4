"""``collectives.json``: the latest collectives of each rank, which name the culprit of a hang.

Ranks call the same collectives in the same order. Where some ranks wait in a collective that others
have never reached, the others are the reason. A rank that was killed leaves no such file: then the
numbers in the phase rings of all ranks count, where PPO trains. Standard library only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from esper_lightning.forensics.phases import COLLECTIVE, Phases
from esper_lightning.forensics.reading import parse_json, read_file

__all__ = [
    "Collectives",
    "collectives_in",
    "describe_collectives",
    "late_ranks",
    "read_collectives",
]

_MOST_RANKS = 8


class Collectives(NamedTuple):
    """How far a rank has come in the order of collectives of all ranks."""

    reached: int
    """Number of the latest collective that the rank has called; 0 before the first."""
    finished: str | None
    """The latest collective that has ended, by an error too; ``None`` without one."""
    waits_in: str | None
    """The first collective that has not ended; ``None`` if all have."""


def read_collectives(path: Path) -> Collectives | None:
    """The collectives of a rank; ``None`` if the file is missing or damaged."""
    try:
        content = parse_json(read_file(path))
        entries = sorted(_of_all_ranks(content), key=lambda entry: entry["collective_seq_id"])
        done = [_name(entry) for entry in entries if entry["retired"]]
        waiting = [_name(entry) for entry in entries if not entry["retired"]]
        reached = entries[-1]["collective_seq_id"] if entries else 0
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return Collectives(reached, done[-1] if done else None, waiting[0] if waiting else None)


def collectives_in(phases: Phases | None) -> Collectives | None:
    """The collectives that a rank has noted in its phase ring; ``None`` if it has noted none."""
    if phases is None or not phases.collectives_begun:
        return None
    done = [span.name for span in phases.closed if span.name.startswith(COLLECTIVE)]
    waiting = [span.name for span in phases.open if span.name.startswith(COLLECTIVE)]
    begun, finished = phases.collectives_begun, phases.collectives_finished
    return Collectives(
        begun,
        f"#{finished} {done[-1].removeprefix(COLLECTIVE)}" if done else None,
        f"#{begun} {waiting[-1].removeprefix(COLLECTIVE)}" if waiting else None,
    )


def late_ranks(found: Mapping[int, Collectives | None]) -> list[int]:
    """The ranks that never reached a collective in which others wait.

    Args:
        found: Collectives by rank; ``None`` for a rank that left no record.
    """
    known = {rank: each for rank, each in sorted(found.items()) if each is not None}
    if len(known) < 2 or not any(each.waits_in for each in known.values()):
        return []
    furthest = max(each.reached for each in known.values())
    return [rank for rank, each in known.items() if each.reached < furthest]


def _of_all_ranks(content: Any) -> list[dict[str, Any]]:
    """The collectives of the group of all ranks; other groups have an order of their own."""
    entries = cast(list[dict[str, Any]], content["entries"])
    return [
        entry
        for entry in entries
        if isinstance(entry["collective_seq_id"], int)
        and not entry.get("is_p2p")
        and entry.get("process_group", ["0"])[0] == "0"
    ]


def _name(entry: Mapping[str, Any]) -> str:
    shapes = cast(list[list[int]], entry.get("input_sizes") or [[]])
    sizes = "x".join(map(str, shapes[0])) or "1"
    kind = ",".join(cast(list[str], entry.get("input_dtypes") or []))
    return f"#{entry['collective_seq_id']} {entry.get('profiling_name')} of {sizes} {kind}".rstrip()


def describe_collectives(found: Mapping[int, Collectives | None]) -> list[str]:
    """Lines that say in which collective each rank was, and which ranks never reached it.

    Args:
        found: Collectives by rank; ``None`` for a rank that left no record.

    Returns:
        The lines; none if fewer than two ranks have a record.
    """
    known = {rank: each for rank, each in sorted(found.items()) if each is not None}
    if len(known) < 2:
        return []
    lines = ["Collectives:"]
    for rank, each in [*known.items()][:_MOST_RANKS]:
        waits = f"waits in {each.waits_in}" if each.waits_in else "waits in none"
        lines.append(f"    rank {rank}: {waits}; finished {each.finished or 'none'}")
    if late := late_ranks(found):
        names = ", ".join(map(str, late[:_MOST_RANKS]))
        lines.append(f"Never reached #{min(known[k].reached for k in late) + 1}: rank {names}")
    return lines
