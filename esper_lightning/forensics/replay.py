"""A replay of a dead run, and the verdict on it, from the files of both. Standard library only.

``replay.json`` in the run directory of a replay says what is replayed (``ReplayRecord``). The
verdict needs nothing but files, so that there is one whatever has ended the replay.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

from esper_lightning.forensics.deaths import (
    are_same_death,
    failing_iteration,
    in_words,
    is_effect,
    is_same_when_deep,
    other_text,
    signature_of,
)
from esper_lightning.forensics.fingerprint import differences
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import numbered_rows, parse_json, read_file
from esper_lightning.forensics.records import Record
from esper_lightning.forensics.remains import Remains, examine, first_failure
from esper_lightning.forensics.report import CrashReport
from esper_lightning.forensics.room import write_json

__all__ = [
    "BY_PROGRAM",
    "ReplayRecord",
    "Verdict",
    "can_start_again",
    "compared",
    "judge",
    "needs_program",
    "row_differences",
]

BY_PROGRAM = "# A program started this run, with "
"""Begin of the first line of a ``config.yaml`` that lacks objects of the run: their names follow a
colon. Configs of earlier runs name callbacks alone.
"""

Outcome = Literal["reproduced", "did not happen again", "different", "undecided"]
_OF_TIME = re.compile(
    r"(^|[/_])(time|seconds|secs?|duration|elapsed|fps|sps|throughput)($|[/_])"
    r"|_(s|ms|us|ns)$|per_s(ec)?(ond)?$|^resumed_(with_new_episodes|on_ranks)$"
)
_MOST_COLUMNS = 4
_WELL: Outcome = "did not happen again"
_STATE = "state that no checkpoint holds"
_COUNTERS = ("iteration", "env_steps", "gradient_steps")  # columns that say nothing of a state


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
        lacks: What the start of the replay does not restore, and decides what happens, in a few
            words; ``None`` if nothing is known to be absent.
        whole_rows: Whether rows of the replay hold all that those of the run do. Otherwise they
            hold what their own step has logged: other values are no function of the state.
        more_dirs: Absolute paths of the copies of that run directory on hosts that share no disk.
        stopped_by: Signal that ended ``esper replay``, which then ended the replay.
    """

    run_dir: str | None = None
    started_s: float | None = None
    rank: int | None = None
    iteration: int | None = None
    begins: int | None = None
    start: str | None = None
    deep: bool = False
    lacks: str | None = None
    whole_rows: bool = True
    more_dirs: tuple[str, ...] = ()
    stopped_by: str | None = None

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
    again``: the failing iteration went well. ``different``: from ``iteration`` on. ``undecided``:
    the replay has not finished the failing iteration, as where it was stopped, or its start could
    not repeat the run."""
    iteration: int
    """Iteration that failed; for ``different``, the first one that is not the same."""
    rows: int
    """Number of history rows of all ranks that are the same, and hold more than counters."""
    reason: str
    """Error of the replay, or what differs, in one line."""
    conditions: tuple[str, ...]
    """What differs between the conditions of the two runs (``fingerprint.differences``)."""
    from_start: str | None = None
    """What to type for a replay from the beginning of the run; ``None`` for such a replay."""

    @property
    def lines(self) -> list[str]:
        """The verdict in words; its first line is the verdict itself."""
        rows = "There was no value in the rows of the history to compare."
        if self.rows:
            are = "row of the history is" if self.rows == 1 else "rows of the history are"
            rows = f"{self.rows} {are} the same, bit for bit."
        differs = f"What differs between the runs: {', '.join(self.conditions)}."
        if self.outcome == "reproduced":
            return [f"Reproduced: {self.reason}", rows]
        if self.outcome == "different":
            lines = [f"Different from iteration {self.iteration} on: {self.reason}"]
            if not self.conditions:
                differs = "What differs between the runs: nothing that is on record."
            return [*lines, differs, *self._advice(f"{_STATE[0].upper()}{_STATE[1:]} may differ.")]
        if self.outcome == "undecided":
            lines = [f"Undecided: {self.reason}", rows]
            return [*lines, *([differs] if self.conditions else []), *self._advice()]
        well = f"iteration {self.iteration} went well" if self.iteration else "training began"
        lines = [f"Did not happen again: {well}.", rows, *([differs] if self.conditions else [])]
        cause = "If that is not the cause, it" if self.conditions else "The cause"
        others = "another process, hardware, an environment variable, a race"
        others += f", or {_STATE}" if self.from_start else ""
        return [*lines, f"{cause} is outside of the program's state: {others}.", *self._advice()]

    def _advice(self, reason: str = "") -> list[str]:
        """What a replay that began at a checkpoint leaves to try."""
        if self.from_start is None:
            return []
        text = f"{reason} A replay from the beginning of the run has all state:".lstrip()
        return [text, f"    {self.from_start}"]


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


def can_start_again(config: Path) -> bool:
    """Whether a file holds the config of a run that can be started without its program."""
    try:
        return needs_program(config) is None
    except (OSError, ValueError):
        return False


def compared(row: Mapping[str, Any]) -> dict[str, str]:
    """The values of a history row that a replay repeats, as text: all but times and rates."""
    return {name: repr(value) for name, value in row.items() if not _OF_TIME.search(name)}


def row_differences(
    recorded: Mapping[str, Any], again: Mapping[str, Any], *, whole: bool = True
) -> list[str]:
    """What differs between two rows of an iteration, such as ``loss/value 0.5 -> 0.6``.

    Args:
        recorded: Row of the run that died.
        again: Row of the replay.
        whole: Whether values that are in the row of the run alone are a difference.
    """
    one, other = compared(recorded), compared(again)
    names = [
        name for name in ({**one, **other} if whole else other) if one.get(name) != other.get(name)
    ]
    return [f"{name} {one.get(name, 'absent')} -> {other.get(name, 'absent')}" for name in names]


def judge(directory: Path, dead: Sequence[Remains]) -> Verdict:
    """The verdict on a replay that has ended.

    Args:
        directory: Run directory of the replay.
        dead: Remains of the ranks of the run that died (``remains.examine``).

    Raises:
        ValueError: If the directory is that of no replay, the replay runs still or vanished without
            a death, or the run that died is no longer in its directory.
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
    if again is None and own.state != "finished":
        raise ValueError(f"The replay must run to its end: it is {own.state}.")
    rows, found = _compare_rows(record, directory, dead)
    again, died_alike = _counterpart(record, directory, (first, dead), (again, ranks))
    outcome, iteration, reason = _decide(record, directory, first, again, died_alike, found)
    if record.lacks and outcome != "reproduced":
        if outcome == _WELL:
            reason = f"iteration {iteration} went well."
        elif outcome == "different":
            reason = f"different from iteration {iteration} on ({reason})."
        reason += f" The start of the replay does not restore {record.lacks}."
        outcome = "undecided"
    ended_early = outcome == "undecided" and not record.lacks
    how = None if ended_early else _from_start(record, first)
    return Verdict(outcome, iteration, rows, reason, conditions, how)


def _decide(
    record: ReplayRecord,
    directory: Path,
    first: Remains,
    again: Remains | None,
    died_alike: bool,
    found: tuple[int, str] | None,
) -> tuple[Outcome, int, str]:
    """Outcome of a replay, the iteration that it is about, and the reason.

    Args:
        record: What is replayed.
        directory: Run directory of the replay.
        first: Remains of the rank that failed first in the run that died.
        again: Remains of the rank of the replay whose death is compared; ``None`` without a death.
        died_alike: Whether both runs died of the same error.
        found: First row that differs, and what differs in it.
    """
    failing = record.iteration or 0
    if found is not None:
        iteration, what = found
        what += "; it died in the same way all the same" if died_alike else ""
        return "different", iteration, what
    if again is None:
        return _of_the_end(record, directory)
    reason, at = in_words(again), failing_iteration(again)
    if died_alike:
        reason += other_text(first, again, (directory.absolute(), *record.directories))
        return "reproduced", failing, reason
    if at > failing:
        return _WELL, failing, reason
    stop = _stop(record, again)
    if stop is not None:
        over = f"iteration {failing} was over" if failing else "training began"
        return "undecided", failing, f"the replay ended in iteration {at} ({stop}), before {over}."
    return "different", at, f"{reason}, not {in_words(first)}"


def _of_the_end(record: ReplayRecord, directory: Path) -> tuple[Outcome, int, str]:
    """Outcome of a replay that has ended without a death, with iteration and reason."""
    failing = record.iteration or 0
    files = RunLayout(directory).rank(record.rank or 0)
    numbers = (number for number, _ in numbered_rows(files.history))
    done = max(numbers, default=record.begins or 0)
    if done < failing:
        reason = f"the replay ended after iteration {done}, before iteration {failing} was over."
        return "undecided", failing, reason
    return _WELL, failing, ""


def _from_start(record: ReplayRecord, first: Remains) -> str | None:
    """What to type for a replay from the beginning; ``None`` if this replay began there."""
    if record.start in (None, first.resumed_from):
        return None
    if can_start_again(RunLayout(record.directories[0]).config):
        places = " ".join(shlex.quote(str(place)) for place in record.directories)
        return f"esper replay {places} --from_start"
    return f"replay(trainer, model, {record.run_dir!r}, from_start=True)"


def _compare_rows(
    record: ReplayRecord, directory: Path, dead: Sequence[Remains]
) -> tuple[int, tuple[int, str] | None]:
    """Number of rows that are the same, and the first that differs, with what differs."""
    rows, found = 0, None
    begins, last = record.begins or 0, record.iteration or 0
    if record.deep:  # another rounding shows in the row of the failing iteration
        last -= 1
    for remains in dead:
        old = RunLayout(remains.directory).rank(remains.rank).history
        new = RunLayout(directory).rank(remains.rank).history
        again = dict(numbered_rows(new))
        for number, row in numbered_rows(old):
            if begins < number <= last and number in again:
                what = row_differences(row, again[number], whole=record.whole_rows)
                rows += not what and not compared(again[number]).keys() <= set(_COUNTERS)
                if what and (found is None or number < found[0]):
                    found = number, ", ".join(what[:_MOST_COLUMNS])
    return rows, found


def _counterpart(
    record: ReplayRecord,
    directory: Path,
    died: tuple[Remains, Sequence[Remains]],
    again: tuple[Remains | None, Sequence[Remains]],
) -> tuple[Remains | None, bool]:
    """The rank of a replay whose death is compared, and whether both runs died of the same error.

    Args:
        record: What is replayed.
        directory: Run directory of the replay.
        died: Remains of the rank that failed first in the run that died, and of all its ranks.
        again: The same of the replay; ``None`` without a death.
    """
    (first, dead), (other, ranks) = died, again
    if other is None or (record.stopped_by and _stop(record, other)):
        return other, False
    if not first.is_first_cause:
        return other, is_effect(first, other)
    directories = directory.absolute(), *record.directories

    def is_same(one: Remains, other: Remains) -> bool:
        if not (one.failed and other.failed):
            return False
        if record.deep:
            return is_same_when_deep(one, other)
        return signature_of(one, directories).is_same(signature_of(other, directories))

    if not are_same_death(first, dead, other, ranks, is_same):
        return other, False
    of_rank = (each for each in ranks if each.rank == first.rank and is_same(first, each))
    return next(of_rank, other), True


def _stop(record: ReplayRecord, again: Remains) -> str | None:
    """What has stopped a replay from outside, as far as is known; ``None`` for another death."""
    report = again.report or CrashReport(cause="vanished")
    if report.cause not in ("signal", "vanished", "peer"):
        return None
    if record.stopped_by:
        return record.stopped_by
    if report.cause == "peer":
        return None
    what = report.signal or report.what_happened or "its process vanished"
    return what.partition(" (")[0]  # without the memory that the process had
