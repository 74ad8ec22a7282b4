"""Whether a vector environment resets single environments, found by trying.

Axes: ``B`` environment. Some vector environments ignore ``options["reset_mask"]`` without a word,
and reset everything.
"""
# Simulators are recognised by their members and have no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import numpy as np
import numpy.typing as npt

from esper_lightning.core.errors import require
from esper_lightning.envs.adapters.spaces import idle_action, some_action

__all__ = ["require_reset_of_rows"]

Array = npt.NDArray[Any]
_STEPS = 20  # after which an observation has changed, in most simulators


def require_reset_of_rows(
    env: Any, seed: int | None, *, name: str, masked: bool, hint: str
) -> None:
    """Reset the first environment, and check that the others continue their episodes.

    Args:
        env: Vector environment of several environments, which is left within episodes.
        seed: Seed of the reset before; ``None`` for a simulator that has been seeded already.
        name: Name of the task in the error.
        masked: Whether some actions may be forbidden.
        hint: Way out, which ends the error.

    Raises:
        ValueError: If the others were reset, too.
    """
    stepped, others = _step_away_from_the_start(env, seed, masked=masked)
    first = np.arange(env.num_envs) == 0
    cause: Exception | None = None
    try:
        after = _arrays(env.reset(options={"reset_mask": first.copy()})[0])
        only_those = len(after[0]) == 1
        pairs = zip(stepped, after, strict=True)
        kept = only_those or all(np.array_equal(old[others], new[others]) for old, new in pairs)
    except Exception as error:  # a simulator may raise anything for options that it does not take
        kept, cause = False, error
    rule = (
        "reset single environments (options['reset_mask']) or be made with autoreset_mode=SAME_STEP"
    )
    try:
        require(kept, name, rule, type(env).__name__, hint)
    except ValueError as error:
        raise error from cause


def _step_away_from_the_start(
    env: Any, seed: int | None, *, masked: bool
) -> tuple[list[Array], Array]:
    """Observations after some steps, and the rows beside the first that a reset would change.

    Where nothing moves in so many steps, these are all rows beside the first.
    """
    start = _arrays(env.reset(**({} if seed is None else {"seed": seed}))[0])
    generator, stepped = np.random.default_rng(0), start
    action = idle_action(env.single_action_space, env.num_envs)
    for _ in range(1 if masked else _STEPS):
        obs, _, terminated, truncated, _ = env.step(action)
        stepped = _arrays(obs)
        ended = np.asarray(terminated, bool) | np.asarray(truncated, bool)
        shows = ~ended & np.any(
            [
                (old != new).reshape(env.num_envs, -1).any(1)
                for old, new in zip(start, stepped, strict=True)
            ],
            axis=0,
        )
        shows[0] = False
        if shows.any():
            return stepped, np.flatnonzero(shows)
        if ended.any():
            break
        action = some_action(env.single_action_space, env.num_envs, generator)
    return stepped, np.arange(1, env.num_envs)


def _arrays(obs: Any) -> list[Array]:
    """Copies of the groups of an observation."""
    return [np.array(value) for value in (obs.values() if isinstance(obs, dict) else [obs])]
