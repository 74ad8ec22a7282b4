"""The text of ``esper crash --attempts``: every start in a run directory. Standard library only."""

import time
from pathlib import Path

from esper_lightning.forensics.attempts import SAME_DEATH_STATUS, Attempt, same_deaths

__all__ = ["describe_attempts", "mention_attempts"]

_LONGEST = 60


def describe_attempts(directory: Path, attempts: list[Attempt]) -> list[str]:
    """The lines that ``esper crash --attempts`` prints.

    Args:
        directory: Run directory.
        attempts: Attempts in the directory, the oldest first.
    """
    lines = [f"Run directory: {directory}", ""]
    lines.append(
        f"{'#':>3}  {'begun':<19}{'after':>10}{'rank':>6}  {'state':<9}{'cause':<11}"
        f"{'iteration':>9}{'status':>8}  what"
    )
    for number, each in enumerate(attempts, 1):
        began, ended = each.started_s, each.ended_s
        begun = "unknown" if began is None else _at(began)
        after = "-" if began is None or ended is None else f"{max(0.0, ended - began):,.1f} s"
        what = each.what or ""
        what = what if len(what) <= _LONGEST else f"{what[: _LONGEST - 3]}..."
        lines.append(
            f"{number:>3}  {begun:<19}{after:>10}{_or_dash(each.rank):>6}  {each.state or '-':<9}"
            f"{each.cause or '-':<11}{_or_dash(each.iteration):>9}"
            f"{_or_dash(each.exit_status):>8}  {what}".rstrip()
        )
    same = same_deaths(attempts)
    if same > 1:
        last = attempts[-1]
        lines += ["", f"{same} attempts died in iteration {last.iteration} of the same error."]
        lines += [f"    {last.place}"] if last.place else []
        lines.append(f"esper fit ends such an attempt with status {SAME_DEATH_STATUS}.")
    return lines


def mention_attempts(directory: Path, attempts: list[Attempt]) -> list[str]:
    """A line about earlier attempts, if there are any.

    Args:
        directory: Run directory.
        attempts: Attempts in the directory, the oldest first.
    """
    if len(attempts) < 2:
        return []
    same = same_deaths(attempts)
    alike = f", of which {same} died of the same error in the same iteration" if same > 1 else ""
    return ["", f"{len(attempts)} attempts{alike}: esper crash --attempts {directory}"]


def _at(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)
