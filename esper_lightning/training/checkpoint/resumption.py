"""What each rank saves and resumes beside weights; ranks that would resume differently are refused.

Each rank has its own environments, running episodes and random streams. They are saved between
iterations only: within one they are ahead of the counters.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from esper_lightning.core.errors import require
from esper_lightning.core.ranks import Ranks, RanksDisagreeError
from esper_lightning.core.seeding import global_random_states, set_global_random_states
from esper_lightning.ppo.learner import Learner
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.states import digest
from esper_lightning.training.settings import PPOSettings
from esper_lightning.training.specs import first_difference

__all__ = ["Resumption", "rank_states", "refuse_other_ranks", "refuse_other_weights_of_ranks"]


class Resumption(NamedTuple):
    """What one rank takes from a checkpoint when training is resumed."""

    rank_state: dict[str, Any] | None  # of this rank; None where the checkpoint has none
    digest: int  # of the whole checkpoint, where several ranks resume; else 0

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any], rank: int, world_size: int) -> Self:
        """Take this rank's part of a checkpoint.

        Args:
            checkpoint: A checkpoint of PPO.
            rank: Number of this rank.
            world_size: Number of ranks that resume.
        """
        state = checkpoint[STATE_KEY]["ranks"].get(rank)
        return cls(state, digest(checkpoint) if world_size > 1 else 0)

    def start(self, learner: Learner, optimizer: torch.optim.Adam) -> bool:
        """Start a learner where the checkpoint left it.

        Returns:
            Whether the episodes of the checkpoint are resumed; if not, new ones begin.

        Raises:
            ValueError: If the checkpoint is of other environments.
        """
        resumed = learner.start(optimizer, self.rank_state)
        if self.rank_state is not None:
            set_global_random_states(self.rank_state["global_random"])
        return resumed


def rank_states(
    learner: Learner | None, ranks: Ranks, *, rank: int, alone: bool
) -> dict[int, dict[str, Any]]:
    """State of the learner of each rank, on the first rank; a collective, unless ``alone``.

    Args:
        learner: Learner of this rank; ``None`` where there is none, or within an iteration.
        ranks: All ranks of the run.
        rank: Number of this rank.
        alone: Whether the other ranks may not be there: the state of this rank is all then.
    """
    mine = None if learner is None else learner.state_dict()
    if mine is None:
        return {}
    mine["global_random"] = global_random_states()
    if alone:
        return {rank: mine}
    return dict(enumerate(ranks.collect_states(mine)))


def refuse_other_ranks(
    ranks: Ranks, settings: PPOSettings, module: nn.Module, *, iteration: int, loaded: int
) -> None:
    """Refuse ranks with other settings or checkpoints: they would train different weights.

    Args:
        ranks: All ranks of the run.
        settings: Settings of this rank.
        module: The PPO module of this rank.
        iteration: Iterations finished.
        loaded: ``Resumption.digest`` of this rank; 0 for a new run.

    Raises:
        RanksDisagreeError: On every rank, if any would start with other settings or another state.
    """
    try:
        own = {name: value for name, value in settings.to_data().items() if name != "warm_start"}
        name, values = first_difference("PPO", ranks.gather_objects(own))
        hint = "Every host must have the same settings."
        require(not values, name, "be the same on all ranks", values, hint)
        numbers = (iteration, loaded, digest({"state_dict": module.state_dict()}))
        everyones: list[tuple[int, int, int]] = ranks.gather_objects(numbers)
        got: list[int | str] = [iteration for iteration, *_ in everyones]
        if len(set(got)) == 1:  # what the files hold tells them apart
            got = [f"iteration {i} of {file ^ weights:012x}" for i, file, weights in everyones]
        resumes = any(iteration or file for iteration, file, _ in everyones)
        field = "ckpt_path" if resumes else "PPO.warm_start"
        hint = "Every host must find the same checkpoint: copy it, or use a shared directory."
        require(len(set(everyones)) == 1, field, "be the same on all ranks", got, hint)
    except ValueError as error:
        raise RanksDisagreeError(str(error)) from None


def refuse_other_weights_of_ranks(ranks: Ranks, module: nn.Module, *, iteration: int) -> None:
    """Stop where the weights of ranks are not the same bits.

    Args:
        ranks: All ranks of the run.
        module: The PPO module of this rank.
        iteration: Iterations finished, for the error.

    Raises:
        RuntimeError: On every rank, if any differs.
    """
    weights = digest({"state_dict": module.state_dict()})
    got = [f"{each:012x}" for each in ranks.gather_objects(weights)]
    if len(set(got)) > 1:
        raise RuntimeError(
            f"The weights of all ranks must be the same, got {got} in iteration {iteration}. Hosts "
            "with other software or hardware, or code that depends on the rank, train different "
            "weights."
        )
