"""Groups of runs that differ in nothing but their seeds, and the rules for comparing groups."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_lightning.comparison.runs import Run, identity
from esper_lightning.core.errors import require

__all__ = ["Variant", "group"]

_MOST_SETTINGS = 3  # in a name; with more settings, the name of a folder says more
_ABSENT = "(absent)"


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but their seeds."""

    name: str
    runs: dict[int, Run]  # by seed

    @property
    def budget(self) -> int | None:
        """Environment steps that each of its runs was to take."""
        return next(iter(self.runs.values())).budget


def group(runs: Sequence[Run]) -> list[Variant]:
    """Variants, in the order of their first runs.

    A variant is named by the settings that differ between runs, or by the folder of its runs where
    settings do not distinguish variants or are more than three.

    Raises:
        ValueError: If environments differ, a seed occurs twice in a variant, or no seed is in all
            variants.
    """
    _refuse_other_environments(runs)
    varying = _varying(runs)
    groups = _by(runs, lambda run: _values(run, varying))
    by_folder = any(len({run.seed for run in group}) < len(group) for group in groups)
    if by_folder:
        groups = _by(runs, lambda run: (str(_parent(run)), *_values(run, varying)))
    names = _names(groups, varying, by_folder=by_folder)
    variants: list[Variant] = []
    for name, members in zip(names, groups, strict=True):
        by_seed: dict[int, Run] = {}
        for run in members:
            twice = by_seed.setdefault(run.seed, run)
            got = f"{twice.directory} and {run.directory}"
            rule = f"have one run of seed {run.seed}"
            require(twice is run, f"Variant {name!r}", rule, got, "Name one of them.")
        variants.append(Variant(name, dict(sorted(by_seed.items()))))
    shared = set[int].intersection(*(set(variant.runs) for variant in variants))
    seeds = "; ".join(f"{v.name}: {', '.join(map(str, v.runs))}" for v in variants)
    hint = "Scores of different seeds are not compared."
    require(bool(shared), "Variants", "have a seed in common", seeds, hint)
    return variants


def _refuse_other_environments(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs:
        names = [n for n in {**first.settings, **run.settings} if n.startswith("env.")]
        for name in names:
            mine, theirs = run.settings.get(name), first.settings.get(name)
            got = f"{theirs!r} in {first.directory} and {mine!r} in {run.directory}"
            hint = "Compare runs of one environment."
            same = identity(mine) == identity(theirs)
            require(same, f"model.{name}", "be the same in all runs", got, hint)


def _varying(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({_values(run, [name]) for run in runs}) > 1]


def _values(run: Run, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(identity(run.settings.get(name, _ABSENT)) for name in names)


def _by(runs: Sequence[Run], key: Callable[[Run], tuple[str, ...]]) -> list[list[Run]]:
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return list(groups.values())


def _names(groups: list[list[Run]], varying: Sequence[str], *, by_folder: bool) -> list[str]:
    settings = [
        ", ".join(f"{n}={_spelled(group[0].settings.get(n, _ABSENT))}" for n in varying)
        for group in groups
    ]
    folders = [_folder(group) for group in groups]
    if not by_folder and 0 < len(varying) <= _MOST_SETTINGS:
        return settings
    if len(set(folders)) == len(folders):
        return folders
    folders = [str(_parent(group[0])) for group in groups]
    return [": ".join(filter(None, names)) for names in zip(folders, settings, strict=True)]


def _folder(runs: Sequence[Run]) -> str:
    """Name for the runs of a variant: that of the folder that holds them.

    A single run has the name of its own directory, unless that is a number or names a seed.
    """
    own = runs[0].directory.absolute().name
    is_numbered = re.match(r"(seed|version)?[-_]?\d+$", own) is not None
    return own if len(runs) == 1 and not is_numbered else _parent(runs[0]).name


def _parent(run: Run) -> Path:
    return run.directory.absolute().parent


def _spelled(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
