"""The state of each rank that is saved and resumed besides weights, and comparisons of ranks.

Each rank has environments, running episodes and random streams of its own. They are saved between
iterations only, because within an iteration they are ahead of the counters. Ranks that would resume
different states are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from esper_lightning.core.errors import require
from esper_lightning.core.ranks import FirstMessage, Ranks, RanksDisagreeError
from esper_lightning.core.seeding import global_random_states, set_global_random_states
from esper_lightning.ppo.learner import Learner
from esper_lightning.training.checkpoint.content import STATE_KEY, refuse_not_ours
from esper_lightning.training.checkpoint.redeal import deal_rank, is_dealt
from esper_lightning.training.checkpoint.states import digest, load_checkpoint
from esper_lightning.training.settings import PPOSettings
from esper_lightning.training.specs import first_difference

__all__ = ["Resumption", "rank_states", "refuse_other_ranks", "refuse_other_weights_of_ranks"]


class Resumption(NamedTuple):
    """The state that one rank takes from a checkpoint when training is resumed."""

    rank_state: dict[str, Any] | None  # state of this rank; None where the checkpoint has none

    redealt_to: int | None = None  # number of ranks to which environments were dealt anew, if so

    @classmethod
    def read(
        cls,
        checkpoint: Mapping[str, Any],
        settings: PPOSettings,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> Self:
        """Read the state of one rank from a checkpoint, or deal it from those of all former ranks.

        Args:
            checkpoint: A checkpoint of PPO.
            settings: Settings of the run.
            rank: Number of this rank.
            world_size: Number of ranks of the run.
            device: Device of the environments.
        """
        if not is_dealt(checkpoint, settings, world_size=world_size):
            return cls(checkpoint[STATE_KEY]["ranks"].get(rank))
        dealt = deal_rank(checkpoint, settings, rank=rank, world_size=world_size, device=device)
        return cls(dealt, redealt_to=world_size)

    def start(self, learner: Learner, optimizer: torch.optim.Adam) -> bool:
        """Start a learner in the state of the checkpoint.

        Args:
            learner: Learner of this rank.
            optimizer: Adam over the policy, with its state restored.

        Returns:
            Whether the episodes of the checkpoint are resumed; if not, new ones begin.

        Raises:
            ValueError: If the checkpoint belongs to other environments.
        """
        resumed = learner.start(optimizer, self.rank_state)
        if self.rank_state is not None:
            set_global_random_states(self.rank_state["global_random"])
        return resumed


def rank_states(
    learner: Learner | None,
    ranks: Ranks,
    *,
    rank: int,
    alone: bool,
    more: Callable[[Learner], dict[str, Any]] = lambda _: {},
) -> dict[int, dict[str, Any]]:
    """States of the learners of all ranks, gathered on the first rank.

    This is a collective, unless ``alone``.

    Args:
        learner: Learner of this rank; ``None`` before a run starts, and within an iteration.
        ranks: All ranks of the run.
        rank: Number of this rank.
        alone: Whether other ranks may be gone, so that the state of this rank alone is returned.
        more: Function from the learner to further entries of its state.
    """
    mine = None if learner is None else learner.state_dict()
    if learner is None or mine is None:
        return {}
    mine |= more(learner)
    mine["global_random"] = global_random_states()
    if alone:
        return {rank: mine}
    return dict(enumerate(ranks.collect_states(mine)))


class _Start(NamedTuple):
    """What a rank starts training from."""

    iteration: int = 0  # iterations finished
    loaded: int = 0  # hash of the checkpoint that is resumed; 0 for a new run
    weights: int = 0  # hash of the initial weights, and of those of a warm start
    problem: str = ""  # why the rank cannot start; empty if it can


def refuse_other_ranks(
    ranks: Ranks,
    settings: PPOSettings,
    module: nn.Module,
    *,
    iteration: int,
    resumes_from: str | Path | None,
    share: Callable[[Ranks, str | Path | None], str | Path | None],
    load: Callable[[str | Path], dict[str, Any]],
) -> None:
    """Refuse ranks with different settings or checkpoints, which would train different weights.

    Args:
        ranks: All ranks of the run.
        settings: Settings of this rank.
        module: The PPO module of this rank, which has loaded nothing yet.
        iteration: Iterations that the module has finished before this run.
        resumes_from: Checkpoint that this rank has found; ``None`` without one.
        share: Collective that returns the checkpoint that this rank will load, which may be the
            first rank's where this rank has none.
        load: Function that reads the checkpoint, as the Trainer will read it.

    Raises:
        RanksDisagreeError: If any rank would start with other settings or in another state, or one
            rank cannot start; the error is raised on every rank.
        ValueError: If no rank can start: the error of this rank.
    """
    own = {name: value for name, value in settings.to_data().items() if name != "warm_start"}
    messages: list[FirstMessage] = ranks.gather_objects(FirstMessage(own))
    _refuse_problems([each.problem for each in messages])
    try:
        name, values = first_difference("PPO", [each.settings for each in messages])
        hint = "Every host must have the same settings."
        require(not values, name, "be the same on all ranks", values, hint)
    except ValueError as error:
        raise RanksDisagreeError(str(error)) from None
    mine, failure = _Start(), None
    resumes_from = share(ranks, resumes_from)
    try:
        checkpoint = None if resumes_from is None else load(resumes_from)
        if checkpoint is not None:
            refuse_not_ours(checkpoint, str(resumes_from))
        mine = _start(settings, module, iteration, checkpoint)
    except Exception as error:  # the other ranks are waiting
        mine, failure = _Start(problem=f"{type(error).__name__}: {error}"), error
    everyones: list[_Start] = ranks.gather_objects(mine)
    if failure is not None and all(start.problem for start in everyones):
        raise failure
    _refuse_problems([start.problem for start in everyones])
    got: list[int | str] = [start.iteration for start in everyones]
    if len(set(got)) == 1:  # then hashes tell the files apart
        got = [f"iteration {s.iteration} of {s.loaded ^ s.weights:012x}" for s in everyones]
    resumes = any(start.iteration or start.loaded for start in everyones)
    field = "ckpt_path" if resumes else "PPO.warm_start"
    hint = "Every host must find the same checkpoint: copy it, or use a shared directory."
    try:
        require(len(set(everyones)) == 1, field, "be the same on all ranks", got, hint)
    except ValueError as error:
        raise RanksDisagreeError(str(error)) from None


def _refuse_problems(problems: Sequence[str]) -> None:
    for rank, problem in enumerate(problems):
        if problem:
            raise RanksDisagreeError(f"All ranks must be able to start; rank {rank}: {problem}")


def _start(
    settings: PPOSettings,
    module: nn.Module,
    iteration: int,
    checkpoint: Mapping[str, Any] | None,
) -> _Start:
    weights = digest({"state_dict": module.state_dict()})
    if checkpoint is not None:
        return _Start(checkpoint[STATE_KEY]["iteration"], digest(checkpoint), weights)
    if settings.warm_start is not None and iteration == 0:
        checkpoint = load_checkpoint(settings.warm_start, field="PPO.warm_start")
        weights ^= digest({"state_dict": checkpoint["state_dict"]})
    return _Start(iteration, weights=weights)


def refuse_other_weights_of_ranks(ranks: Ranks, module: nn.Module, *, iteration: int) -> None:
    """Stop the run where the weights of ranks do not have the same bits.

    Args:
        ranks: All ranks of the run.
        module: The PPO module of this rank.
        iteration: Iterations finished, for the error.

    Raises:
        RuntimeError: If the weights of any rank differ; the error is raised on every rank.
    """
    weights = digest({"state_dict": module.state_dict()})
    got = [f"{each:012x}" for each in ranks.gather_objects(weights)]
    if len(set(got)) > 1:
        raise RuntimeError(
            f"The weights of all ranks must be the same, got {got} in iteration {iteration}. Hosts "
            "with other software or hardware, or code that depends on the rank, train different "
            "weights."
        )
