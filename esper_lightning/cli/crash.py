"""``esper crash RUN_DIR``: how a run died, from the files that it left. Standard library only.

The folders of a run whose hosts share no disk are read together: ``esper crash DIR DIR ...``.
"""

import sys
from pathlib import Path
from typing import Any

from esper_lightning.cli.crash_attempts import describe_attempts, mention_attempts
from esper_lightning.cli.crash_text import describe, describe_start, seconds_by_phase
from esper_lightning.cli.errors import CommandParser, fail, local_path
from esper_lightning.forensics.attempts import (
    SAME_DEATH_STATUS,
    Attempt,
    read_attempts,
    same_deaths,
)
from esper_lightning.forensics.collectives import describe_collectives
from esper_lightning.forensics.files import strict_json
from esper_lightning.forensics.owner_record import read_owner
from esper_lightning.forensics.rank_record import SCHEMA
from esper_lightning.forensics.reading import printable
from esper_lightning.forensics.remains import (
    Remains,
    collectives_of,
    examine,
    first_failure,
    unrecorded_start,
)
from esper_lightning.forensics.trace import summarize

__all__ = ["Remains", "examine", "first_failure", "run"]


def run(arguments: list[str]) -> None:
    """Print how a run died; exit with status 2 where there is no run.

    With ``--attempts``, the exit status is 65 where another attempt would be of no use.
    """
    parser = CommandParser("esper crash", "How a run died.")
    parser.add_argument(
        "run_dir",
        type=local_path,
        metavar="RUN_DIR",
        nargs="+",
        help="a run directory; several for the copies of one run on several hosts",
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")
    text = "every start in the directory, and how each one ended"
    parser.add_argument("--attempts", action="store_true", help=text)
    options = parser.parse_args(arguments)
    directories: list[Path] = options.run_dir
    directory = directories[0]
    try:
        ranks = examine(*directories)
    except (ValueError, OSError) as error:
        owner = read_owner(directory)
        if not owner:
            fail(error)
        if options.json:
            nothing: dict[str, Any] = {"schema": SCHEMA, "first_failure": None, "ranks": []}
            print(strict_json({**nothing, "owner": owner}))
        else:
            start = describe_start(owner)
            print(printable(f"Run directory: {directory}: {start}"))
        return
    attempts = read_attempts(directories)
    if options.attempts:
        _print_attempts(directory, attempts, as_json=options.json)
        if same_deaths(attempts) > 1:
            sys.exit(SAME_DEATH_STATUS)
        return
    started = unrecorded_start(directory)
    first = first_failure(ranks)
    if first is not None and first.trace_path is not None:
        try:
            first.trace = summarize(first.trace_path)
        except (FileNotFoundError, ValueError) as error:
            first.unreadable[first.trace_path.name] = str(error)
    if options.json:
        print(strict_json(_as_json(ranks, first) | ({"owner": started} if started else {})))
    else:
        if started:
            print(printable(f"{describe_start(started)} What follows is of the run before."))
        lines = describe(directory, ranks, first)
        if directories[1:]:
            lines.insert(1, f"Together with: {', '.join(map(str, directories[1:]))}")
        told = describe_collectives(collectives_of(ranks))
        lines += ["", *told] if told else []
        lines += mention_attempts(directory, attempts)
        print("\n".join(map(printable, lines)))


def _print_attempts(directory: Path, attempts: list[Attempt], *, as_json: bool) -> None:
    if as_json:
        numbers = {"schema": SCHEMA, "same_deaths": same_deaths(attempts)}
        print(strict_json({**numbers, "attempts": [each.to_dict() for each in attempts]}))
    else:
        print("\n".join(map(printable, describe_attempts(directory, attempts))))


def _as_json(ranks: list[Remains], first: Remains | None) -> dict[str, Any]:
    def plain(remains: Remains) -> dict[str, Any]:
        return {
            "rank": remains.rank,
            "state": remains.state,
            "report": remains.report and remains.report.to_dict(),
            "unreadable": remains.unreadable,
            "last_rows": remains.history,
            "rows": remains.rows,
            "damaged_rows": remains.damaged_rows,
            "remarks": remains.remarks,
            "fingerprint": remains.fingerprint and remains.fingerprint.to_dict(),
            "differences": remains.differences,
            "collectives": remains.collectives and remains.collectives._asdict(),
            "open_phases": [span.name for span in remains.phases.open] if remains.phases else [],
            "seconds_by_phase": seconds_by_phase(remains.phases),
            "trace": remains.trace,
            "trace_path": remains.trace_path,
            "windows": remains.windows,
        }

    died = first.rank if first is not None and first.is_first_cause else None
    return {"schema": SCHEMA, "first_failure": died, "ranks": [plain(rank) for rank in ranks]}
