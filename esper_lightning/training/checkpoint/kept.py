"""The states that ranks stored after an iteration, joined into one checkpoint.

``recorder.state_keeper`` writes them; a run that was killed is resumed from there.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.checkpoint.content import STATE_KEY, find_misfit
from esper_lightning.training.checkpoint.files import read_checkpoint

__all__ = ["KeptState", "has_data_order", "has_environments", "iteration_in", "latest_state"]

_log = logging.getLogger(__name__)
_STATE: dict[str, Any] = {"iteration": int, "world_size": int, "ranks": dict, "*": object}
_RANK: dict[str, Any] = {"env": object, "*": object}
_BATCHES = "epoch_loop.batch_progress"  # of Lightning, which counts batches over all epochs
_COUNTS = {"total": {"processed": int, "*": int}, "*": object}
_LOOPS: dict[str, Any] = {"fit_loop": {_BATCHES: _COUNTS, "*": object}, "*": object}


class KeptState(NamedTuple):
    """A state of all ranks between two iterations."""

    iteration: int
    """Number of finished iterations."""
    checkpoint: dict[str, Any]
    """Content of a checkpoint."""


def latest_state(
    *directories: Path, before: int | None = None, since_s: float | None = None
) -> KeptState | None:
    """The latest state that all ranks of a run have stored; ``None`` without one.

    A run that was resumed from such a state, and killed before it stored one of its own, has left
    that from which it was resumed.

    Args:
        *directories: Run directory; several for the copies of one run on hosts that share no disk.
        before: Iteration before which the state must be; ``None`` for any.
        since_s: Begin of the run, in seconds since the epoch: older files are those of an earlier
            run. ``None`` for files of any age.
    """
    layouts = [RunLayout(directory) for directory in directories]

    def states_of(rank: int) -> dict[int, dict[str, Any]]:
        paths = (path for layout in layouts for path in layout.rank(rank).states)
        return _states_in(paths, since_s)

    resumed = _states_in((layout.joined_state for layout in layouts), since_s)
    states = [states_of(0)]
    world_size = max(map(_world_size, states[0].values()), default=1)
    for rank in range(1, world_size):
        states.append(states_of(rank))
        if not states[-1]:
            break
    states = [{n: c for n, c in each.items() if _world_size(c) == world_size} for each in states]
    common = set[int].intersection(*(set(of_rank) for of_rank in states))
    known = [n for n in {*common, *resumed} if before is None or n < before]
    if not known:
        return None
    iteration = max(known)
    if iteration not in common:
        return KeptState(iteration, resumed[iteration])
    checkpoint = states[0][iteration]
    for of_rank in states[1:]:
        checkpoint[STATE_KEY]["ranks"] |= of_rank[iteration][STATE_KEY]["ranks"]
    return KeptState(iteration, checkpoint)


def iteration_in(checkpoint: Mapping[str, Any]) -> int:
    """Number of finished iterations that a checkpoint follows.

    Raises:
        ValueError: If the counters, or the states of ranks, are not such as a run writes.
    """
    if STATE_KEY not in checkpoint:
        loops: Any = checkpoint.get("loops")
        misfit = find_misfit(loops, _LOOPS, "loops")
        count = None if misfit else loops["fit_loop"][_BATCHES]["total"]["processed"]
    else:
        state = checkpoint[STATE_KEY]
        misfit = find_misfit(state, _STATE, STATE_KEY)
        count = None if misfit else state["iteration"]
        ranks: dict[Any, Any] = {} if misfit else state["ranks"]
        for rank, own in ranks.items():
            misfit = misfit or find_misfit(rank, int, f"a key of {STATE_KEY}.ranks")
            misfit = misfit or find_misfit(own, _RANK, f"{STATE_KEY}.ranks.{rank}")
    if misfit:
        raise ValueError(f"Its content must be that of a run: {misfit}.")
    return cast(int, count)


def has_environments(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, whose content is that of a run, has the environments of all ranks.

    The environments of other modules are none of ours: their checkpoints lack nothing.
    """
    if STATE_KEY not in checkpoint:
        return True
    ranks: dict[int, Any] = checkpoint[STATE_KEY]["ranks"]
    is_whole = 0 < len(ranks) == checkpoint[STATE_KEY]["world_size"]
    return is_whole and all(rank["env"] is not None for rank in ranks.values())


def has_data_order(checkpoint: Mapping[str, Any], *, begins_anew: bool = True) -> bool:
    """Whether a run that starts from a checkpoint gets its data in the order of the run before.

    Loaders without a state begin anew, also in the middle of an epoch. PPO has no such data.

    Args:
        checkpoint: A checkpoint whose content is that of a run (``iteration_in``).
        begins_anew: Whether every epoch has the same order, as far as is known.
    """
    if STATE_KEY in checkpoint:
        return True
    loop = cast(dict[str, Any], checkpoint["loops"]["fit_loop"])
    state = loop.get("state_dict")
    if isinstance(state, dict) and cast(dict[str, Any], state).get("combined_loader"):
        return True
    return begins_anew and loop[_BATCHES].get("is_last_batch") is True


def _world_size(checkpoint: Mapping[str, Any]) -> int:
    return checkpoint.get(STATE_KEY, {}).get("world_size", 1)


def _states_in(paths: Iterable[Path], since_s: float | None) -> dict[int, dict[str, Any]]:
    """States by their iterations, without one that a kill has torn or that is too old."""
    found: dict[int, dict[str, Any]] = {}
    for path in paths:
        try:
            if since_s is not None and path.stat().st_mtime <= since_s:
                continue
            checkpoint = read_checkpoint(path)
        except (ValueError, OSError):
            continue
        try:
            found[iteration_in(checkpoint)] = checkpoint
        except ValueError as error:
            _log.warning("%s is not used: %s", path, error)
    return found
