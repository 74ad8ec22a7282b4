"""A replay of a dead run, and the verdict on it, from the files of both. Standard library only.

``replay.json`` in the run directory of a replay says what is replayed (``ReplayRecord``). The
verdict needs nothing but files, so that there is one whatever has ended the replay.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

from esper_lightning.forensics.deaths import (
    failing_iteration,
    in_words,
    is_effect,
    other_text,
    signature_of,
)
from esper_lightning.forensics.fingerprint import differences
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import RowReader, parse_json, read_file
from esper_lightning.forensics.records import Record
from esper_lightning.forensics.remains import Remains, examine, first_failure
from esper_lightning.forensics.room import write_json

__all__ = [
    "BY_PROGRAM",
    "ReplayRecord",
    "Verdict",
    "compared",
    "judge",
    "needs_program",
    "row_differences",
]

BY_PROGRAM = "# A program started this run, with "
"""Begin of the first line of a ``config.yaml`` that lacks objects of the run: their names follow a
colon. Configs of earlier runs name callbacks alone.
"""

Outcome = Literal["reproduced", "did not happen again", "different"]
_OF_TIME = re.compile(
    r"(^|[/_])(time|seconds|secs?|duration|elapsed|fps|sps|throughput)($|[/_])"
    r"|_(s|ms|us|ns)$|per_s(ec)?(ond)?$|^resumed_(with_new_episodes|on_ranks)$"
)
_MOST_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class ReplayRecord(Record):
    """``replay.json``: what a run is the replay of.

    Attributes:
        run_dir: Absolute path of the run directory of the run that died.
        started_s: Begin of that run's recording on the rank that failed first.
        rank: Rank that failed first.
        iteration: Number of the iteration that failed, from 1; 0 for a death before the first.
        begins: Number of finished iterations at the start of the replay.
        start: Checkpoint that the replay starts from; ``None`` for the beginning of the run.
        deep: Whether the replay runs eagerly, so that its numbers are rounded in another way.
        more_dirs: Absolute paths of the copies of that run directory on hosts that share no disk.
    """

    run_dir: str | None = None
    started_s: float | None = None
    rank: int | None = None
    iteration: int | None = None
    begins: int | None = None
    start: str | None = None
    deep: bool = False
    more_dirs: tuple[str, ...] = ()

    @property
    def directories(self) -> tuple[Path, ...]:
        """The run directory, and its copies of other hosts."""
        return tuple(map(Path, (self.run_dir or "", *self.more_dirs)))

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The record in a run directory; ``None`` where the run is no replay."""
        try:
            content = parse_json(read_file(RunLayout(directory).replay))
        except (OSError, ValueError):
            return None
        return cls.from_dict(cast(dict[str, Any], content)) if isinstance(content, dict) else None

    def write(self, directory: Path) -> None:
        """Write the record into a run directory.

        Raises:
            OSError: If the disk takes no more.
        """
        write_json(RunLayout(directory).replay, self.to_dict())


class Verdict(NamedTuple):
    """What a replay has shown."""

    outcome: Outcome
    """``reproduced``: the same error, in the same iteration, at the same line. ``did not happen
    again``: the cause is outside of the program's state. ``different``: from ``iteration`` on."""
    iteration: int
    """Iteration that failed; for ``different``, the first one that is not the same."""
    rows: int
    """Number of history rows of all ranks that were compared."""
    reason: str
    """Error of the replay, or what differs, in one line."""
    conditions: tuple[str, ...]
    """What differs between the conditions of the two runs (``fingerprint.differences``)."""

    @property
    def lines(self) -> list[str]:
        """The verdict in words; its first line is the verdict itself."""
        bits = f"{self.rows} rows of the history are the same, bit for bit."
        if self.outcome == "reproduced":
            lines = [f"Reproduced: {self.reason}", bits if self.rows else ""]
        elif self.outcome == "did not happen again":
            well = f"iteration {self.iteration} went well" if self.iteration else "training began"
            lines = [
                f"Did not happen again: {well}.",
                bits if self.rows else "",
                "The cause is outside of the program's state: another process, hardware, a race.",
            ]
        else:
            lines = [f"Different from iteration {self.iteration} on: {self.reason}"]
            said = ", ".join(self.conditions) or "nothing that is on record"
            lines.append(f"What differs between the runs: {said}.")
        return [line for line in lines if line]


def needs_program(config: Path) -> str | None:
    """What the config of a run lacks, or has from its program alone; ``None`` if it is all there.

    A class of the program's own file, ``__main__``, can be imported by no other program.

    Args:
        config: Path of the ``config.yaml`` of a run.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file cannot be read.
    """
    content = read_file(config).decode(errors="replace")
    first = content.partition("\n")[0]
    if first.startswith(BY_PROGRAM):
        return first.partition(":")[2].strip()
    return ", ".join(dict.fromkeys(re.findall(r"\b__main__\.[\w.]+", content))) or None


def compared(row: Mapping[str, Any]) -> dict[str, str]:
    """The values of a history row that a replay repeats, as text: all but times and rates."""
    return {name: repr(value) for name, value in row.items() if not _OF_TIME.search(name)}


def row_differences(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """What differs between two rows of an iteration, such as ``loss/value 0.5 -> 0.6``."""
    one, other = compared(recorded), compared(again)
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f"{name} {one.get(name, 'absent')} -> {other.get(name, 'absent')}" for name in names]


def judge(directory: Path, dead: Sequence[Remains]) -> Verdict:
    """The verdict on a replay that has ended.

    Args:
        directory: Run directory of the replay.
        dead: Remains of the ranks of the run that died (``remains.examine``).

    Raises:
        ValueError: If the directory is that of no replay, the replay has not come as far as the
            fault, or the run that died is no longer in its directory.
    """
    record, first = ReplayRecord.read(directory), first_failure(list(dead))
    if record is None or record.run_dir is None or record.iteration is None:
        raise ValueError(f"RUN_DIR must be that of a replay, got {str(directory)!r}.")
    if first is None or first.started_s != record.started_s:
        raise ValueError(f"{record.run_dir} must hold the run that died: another run is there now.")
    ranks = examine(directory)
    own = next((each for each in ranks if each.rank == record.rank), ranks[0])
    conditions = ()
    if first.fingerprint is not None and own.fingerprint is not None:
        conditions = differences(first.fingerprint, own.fingerprint)
    again = first_failure(ranks)
    rows, found = _compare_rows(record, directory, dead)
    if found is not None:
        iteration, what = found
        died = again is not None and _same(first, again, record, directory)
        what += "; it died in the same way all the same" if died else ""
        return Verdict("different", iteration, rows, what, conditions)
    if again is None:
        if own.state != "finished":
            raise ValueError(f"The replay must run to its end: it is {own.state}.")
        return Verdict("did not happen again", record.iteration, rows, "", conditions)
    reason = in_words(again)
    if _same(first, again, record, directory):
        reason += other_text(first, again, (directory.absolute(), *record.directories))
        return Verdict("reproduced", record.iteration, rows, reason, conditions)
    at = failing_iteration(again)
    if at > record.iteration:
        return Verdict("did not happen again", record.iteration, rows, reason, conditions)
    reason = f"{reason}, not {in_words(first)}"
    return Verdict("different", at, rows, reason, conditions)


def _compare_rows(
    record: ReplayRecord, directory: Path, dead: Sequence[Remains]
) -> tuple[int, tuple[int, str] | None]:
    """Number of rows that were compared, and the first that differs, with what differs."""
    rows, found = 0, None
    begins, last = record.begins or 0, record.iteration or 0
    if record.deep:  # another rounding shows in the row of the failing iteration
        last -= 1
    for remains in dead:
        old = RunLayout(remains.directory).rank(remains.rank).history
        new = RunLayout(directory).rank(remains.rank).history
        again = dict(_rows(new))
        for number, row in _rows(old):
            if begins < number <= last and number in again:
                rows += 1
                what = row_differences(row, again[number])
                if what and (found is None or number < found[0]):
                    found = number, ", ".join(what[:_MOST_COLUMNS])
    return rows, found


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a history by their iterations; none where the file cannot be read."""
    try:
        for row in RowReader(path):
            if isinstance(row.get("iteration"), int):
                yield row["iteration"], row
    except (OSError, ValueError):
        return


def _same(first: Remains, again: Remains, record: ReplayRecord, directory: Path) -> bool:
    if not first.is_first_cause:
        return is_effect(first, again)
    if first.rank != again.rank:
        return False
    if record.deep:  # anomaly detection and eager code find the same fault at another line
        return failing_iteration(first) == failing_iteration(again)
    directories = directory.absolute(), *record.directories
    return signature_of(first, directories).is_same(signature_of(again, directories))
