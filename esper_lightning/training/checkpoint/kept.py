"""The states that ranks stored after an iteration, joined into one checkpoint.

``recorder.state_keeper`` writes them; a run that was killed is resumed from there.
"""

from pathlib import Path
from typing import Any, NamedTuple, cast

from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.files import read_checkpoint

__all__ = ["KeptState", "latest_state"]


class KeptState(NamedTuple):
    """A state of all ranks between two iterations."""

    iteration: int
    """Number of finished iterations."""
    checkpoint: dict[str, Any]
    """Content of a checkpoint."""


def latest_state(directory: Path, *, before: int | None = None) -> KeptState | None:
    """The latest state that all ranks of a run have stored; ``None`` without one.

    Args:
        directory: Run directory.
        before: Iteration before which the state must be; ``None`` for any.
    """
    layout = RunLayout(directory)
    states = [_states_of(layout.rank(0))]
    known = [state[STATE_KEY] for state in states[0].values() if STATE_KEY in state]
    world_size = cast(int, known[0]["world_size"]) if known else 1
    states += [_states_of(layout.rank(rank)) for rank in range(1, world_size)]
    common = set[int].intersection(*(set(of_rank) for of_rank in states))
    iteration = max((n for n in common if before is None or n < before), default=None)
    if iteration is None:
        return None
    checkpoint = states[0][iteration]
    for of_rank in states[1:]:
        checkpoint[STATE_KEY]["ranks"] |= of_rank[iteration][STATE_KEY]["ranks"]
    return KeptState(iteration, checkpoint)


def _states_of(files: RankLayout) -> dict[int, dict[str, Any]]:
    """The states of one rank by their iterations, without one that a kill has torn."""
    found: dict[int, dict[str, Any]] = {}
    for path in files.states:
        try:
            checkpoint = read_checkpoint(path)
        except (ValueError, OSError):
            continue
        own = checkpoint.get(STATE_KEY, {})
        found[own.get("iteration", checkpoint.get("global_step"))] = checkpoint
    return found
