"""Whether two deaths are the same: the type of the error and the stack decide, and not its text.

Texts are no functions of a program's state: they name temporary files, free memory, times, and sets
in the order of their hashes. One line may raise errors of several kinds, as a function that checks
its arguments does, so that all lines of the user's own files on the stack are compared. Standard
library only.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.messages import comparable
from esper_lightning.forensics.reading import read_file
from esper_lightning.forensics.remains import Remains
from esper_lightning.forensics.report import CrashReport, ErrorReport

__all__ = [
    "DeathSignature",
    "Frame",
    "are_same_death",
    "failing_iteration",
    "frames_of",
    "in_words",
    "is_effect",
    "is_same_when_deep",
    "other_text",
    "signature_of",
]

_FRAME = re.compile(r'^[\s|+]*File "([^"]*)", line (\d+),? in (.*)$')
_NOT_OF_USER = re.compile(
    r"[/\\](site|dist)-packages[/\\]|[/\\]lib[/\\]python\d[^/\\]*[/\\]|[/\\]esper_lightning[/\\]"
    r"|[/\\]lightning[/\\]pytorch[/\\]|^<"
)
_LIGHTNING = re.compile(r"[/\\](lightning[/\\]pytorch|pytorch_lightning)[/\\]")
_RAISES_FOR_OTHERS = re.compile(
    r"[/\\]esper_lightning[/\\](core[/\\]errors|recorder[/\\](arrivals|registry))\.py$"
)
_TOO_DEEP = re.compile(r"^[\s|+]*RecursionError\b")
_LONGEST = 200  # characters of the text of an error that is shown beside another
_SILENT = ("vanished", "exit", "native", "signal")  # causes whose report has no error to compare


class Frame(NamedTuple):
    """A line of a stack."""

    path: str
    line: int
    function: str

    @property
    def is_of_user(self) -> bool:
        """Whether the file is no part of Python, of this package or of an installed one."""
        return _NOT_OF_USER.search(self.path) is None

    @property
    def name(self) -> str:
        """The frame without its folder, which may have been moved: ``env.py:9, in act``."""
        return f"{Path(self.path).name}:{self.line}, in {self.function}"

    def __str__(self) -> str:
        return f'File "{self.path}", line {self.line}, in {self.function}'


def frames_of(traceback: Iterable[str]) -> list[Frame]:
    """The frames in the lines of a traceback, the innermost last.

    Functions of this package that raise errors for their callers are no place: the caller is, and
    the line that a signal has interrupted. Of a recursion without end the frames are those of its
    circle, in the order of their names: at which of them the limit is reached depends on how the
    program was started.
    """
    found: list[Frame] = []
    of_error: list[Frame] = []
    for line in traceback:
        frames = _frames([line])
        of_error += (each for each in frames if not _RAISES_FOR_OTHERS.search(each.path))
        if "Traceback (most recent call last)" in line:
            found, of_error = [*found, *of_error], []
        elif _TOO_DEEP.match(line):
            of_error = _circle(of_error) or of_error
    return [*found, *of_error]


def _circle(frames: Iterable[Frame]) -> list[Frame]:
    """The frames that are on a stack more than once, each once, in the order of their names."""
    repeated = (frame for frame, times in Counter(frames).items() if times > 1)
    return sorted(repeated, key=lambda frame: frame.name)


def _frames(lines: Iterable[str]) -> Iterator[Frame]:
    for line in lines:
        found = _FRAME.match(line)
        if found is not None:
            yield Frame(found[1], int(found[2][:9]), found[3])


@dataclass(frozen=True, kw_only=True)
class DeathSignature:
    """What is compared of a death.

    Attributes:
        iteration: Number of the iteration that failed; 0 for a death before the first.
        cause: Cause of the death, as in ``CrashReport.cause``.
        kind: Type of the error; ``None`` where no Python error was raised.
        message: Text of the error, without numbers and names of run directories.
        place: Line in which the error was raised, without its folder; ``None`` where none is known.
        own_frames: Lines of the user's own files on the stack, the innermost last.
        context: What else is known: a signal, open phases, names of tensors that were not finite.
    """

    iteration: int | None
    cause: str | None
    kind: str | None = None
    message: str = ""
    place: str | None = None
    own_frames: tuple[str, ...] = ()
    context: tuple[str | None, ...] = ()

    def is_same(self, other: "DeathSignature") -> bool:
        """Whether both deaths are of the same error, in the same place and iteration.

        The messages are compared only where no place is known.
        """
        mine, theirs = (
            (each.iteration, each.cause, each.kind, each.place, each.own_frames, each.context)
            for each in (self, other)
        )
        return mine == theirs and (self.place is not None or self.message == other.message)


def signature_of(remains: Remains, directories: Iterable[Path] = ()) -> DeathSignature:
    """What is compared of the death of a rank.

    Args:
        remains: Remains of the rank.
        directories: Run directories, which messages may name.
    """
    report, iteration = remains.report or CrashReport(cause="vanished"), failing_iteration(remains)
    error, phases = report.error or ErrorReport(), report.phases
    if remains.report is None and remains.phases is not None:
        phases = tuple(span.name for span in remains.phases.open)
    if report.cause == "hang":
        stack = _hangs_in(remains)
        return DeathSignature(iteration=iteration, cause=report.cause, context=(*phases, stack))
    if report.cause in _SILENT and error.type is None:
        context = (report.signal, *phases)
        return DeathSignature(iteration=iteration, cause=report.cause, context=context)
    frames, found = frames_of(error.traceback), error.non_finite
    return DeathSignature(
        iteration=iteration,
        cause=report.cause,
        kind=error.type,
        message=comparable(error.message or "", directories),
        place=frames[-1].name if frames else None,
        own_frames=tuple(frame.name for frame in frames if frame.is_of_user),
        context=() if found is None else (found.phase, *found.tensors),
    )


class _OfRank(Protocol):
    """The death of a rank, or its end without one."""

    @property
    def rank(self) -> int | None: ...


_Of = TypeVar("_Of", bound=_OfRank)


def are_same_death(
    first: _Of, one: Sequence[_Of], again: _Of, other: Sequence[_Of], is_same: Callable[..., bool]
) -> bool:
    """Whether two runs died of the same error, on whichever rank of those that died of it.

    Where several ranks die for reasons of their own, it is chance which of them is first. Each
    run's first death must be among those of the other run. An error that several ranks of one
    run have died of depends on no rank: of the other run one rank may be left that died of it,
    because the other ranks were ended before.

    Args:
        first: Rank of the one run that failed first.
        one: All ranks of that run, as far as they are on record.
        again: Rank of the other run that failed first.
        other: All ranks of the other run, as far as they are on record.
        is_same: Function that compares the deaths of two ranks, but for the rank.
    """

    def is_among(death: _Of, ranks: Sequence[_Of]) -> bool | None:
        return next((is_same(each, death) for each in ranks if each.rank == death.rank), None)

    among = is_among(first, other), is_among(again, one)
    return all(among) or (among != (False, False) and is_same(first, again))


def failing_iteration(remains: Remains) -> int:
    """Number of the iteration in which a rank failed; 0 for a death before the first."""
    if remains.report is not None and remains.report.iteration is not None:
        return remains.report.iteration
    return remains.phases.iteration if remains.phases is not None else 0


def in_words(remains: Remains) -> str:
    """A death in one line: what happened, where, and in which iteration."""
    death, what = signature_of(remains), "its process vanished"
    if remains.report is not None:
        what = remains.report.what_happened
    at = f" at {death.place.partition(',')[0]}" if death.place else ""
    return f"iteration {death.iteration}, rank {remains.rank}: {what}{at}"


def is_effect(first: Remains, again: Remains) -> bool:
    """Whether a rank that lost a peer may have died of what a replay died of.

    The folder of the peer is on another host, or lost: its error is not known.

    Args:
        first: Remains of a rank of the run that died, which names the peer if it knew it.
        again: Remains of the rank of the replay that failed first.
    """
    peer = (first.report or CrashReport()).peer
    named = None if peer is None else peer.rank
    is_known = named is not None and named >= 0
    of_peer = again.rank == named if is_known else again.rank != first.rank
    return of_peer and failing_iteration(first) == failing_iteration(again)


def is_same_when_deep(first: Remains, again: Remains) -> bool:
    """Whether a deep replay died of the same fault.

    Eager code fails at another line, and anomaly detection finds a value that is not finite
    earlier, by an error of another type.
    """
    if failing_iteration(first) != failing_iteration(again):
        return False
    one, other = first.report or CrashReport(), again.report or CrashReport()
    if _is_not_finite(one) and _is_not_finite(other):
        return True
    types = [(each.error or ErrorReport()).type for each in (one, other)]
    return one.cause == other.cause and types[0] == types[1]


def _is_not_finite(report: CrashReport) -> bool:
    error = report.error or ErrorReport()
    return error.non_finite is not None or "returned nan values" in (error.message or "")


def other_text(first: Remains, again: Remains, directories: Iterable[Path] = ()) -> str:
    """What the run died of, where a replay shows it with another text; empty for the same text.

    Args:
        first: Remains of the rank of the run that died.
        again: Remains of the same rank of the replay.
        directories: Run directories, which messages may name.
    """
    if not first.is_first_cause:
        return "; the rank of the run that failed first has left no report here to compare"
    one, other = (signature_of(each, directories) for each in (first, again))
    if one.message == other.message or first.report is None:
        return ""
    text = " ".join(first.report.what_happened.split())
    return f"; in the run that died: {text[:_LONGEST]}"


def _hangs_in(remains: Remains) -> str | None:
    """The outermost function of the user's that Lightning has called, in a rank that hangs.

    The functions below, and the line, are those of one moment: a loop without end has many.
    """
    try:
        path = RunLayout(remains.directory).rank(remains.rank).stacks
        content = read_file(path).decode(errors="replace")
    except (OSError, ValueError):
        return None
    main = content.rstrip().rpartition("most recent call first")[2]  # the oldest thread comes last
    outermost_first = [*_frames(main.splitlines())][::-1]
    within = itertools.dropwhile(lambda frame: not _LIGHTNING.search(frame.path), outermost_first)
    found = next((frame for frame in within if frame.is_of_user), None)
    return found and f"{Path(found.path).name}, {found.function}"
