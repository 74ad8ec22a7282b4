"""The environments of a checkpoint, dealt anew to another number of ranks.

A run that has lost a node resumes on the ranks that are left. All environments are retained, with
their running episodes: those of all former ranks stand in one row, of which each rank takes its
share. Random streams belong to ranks and are new, so that the resumed run has the law of the former
one, and not its bits. Axis: ``B`` environment of a rank.
"""
# The types of a checkpoint's content are not known.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper_lightning.core.errors import require
from esper_lightning.core.seeding import stream
from esper_lightning.envs.base import spec_name
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.settings import PPOSettings

__all__ = ["deal_rank", "is_dealt", "refuse_deal"]

_HINT = "Every environment of the checkpoint goes to one rank."


def is_dealt(
    checkpoint: Mapping[str, Any], settings: PPOSettings, *, world_size: int | None
) -> bool:
    """Whether a run deals the environments of a checkpoint anew.

    Args:
        checkpoint: A checkpoint of PPO.
        settings: Settings of the run that resumes from the checkpoint.
        world_size: Number of ranks of that run; ``None`` for an evaluation.
    """
    former = checkpoint[STATE_KEY]["world_size"]
    return settings.redeal and world_size is not None and world_size != former


def refuse_deal(checkpoint: Mapping[str, Any], settings: PPOSettings, *, world_size: int) -> None:
    """Refuse to deal environments that cannot be dealt to these ranks.

    Args:
        checkpoint: A whole checkpoint of PPO.
        settings: Settings of the run that resumes from the checkpoint.
        world_size: Number of ranks of that run.

    Raises:
        ValueError: If states are missing, the number of environments is another one, or the state
            of environments has no row for each of them.
    """
    states, former = checkpoint[STATE_KEY]["ranks"], checkpoint[STATE_KEY]["world_size"]
    has_all = set(states) == set(range(former))
    rule = f"hold the environments of all {former} ranks to be dealt anew"
    require(has_all, "ckpt_path", rule, f"those of ranks {sorted(states)}")
    total = sum(_num_envs(state) for state in states.values())
    mine = settings.env.num_envs * world_size
    require(mine == total, "PPO.env.num_envs * ranks", f"be {total}", mine, _HINT)
    if all(state["env"] is None for state in states.values()):
        return  # new episodes begin, as without another number of ranks
    streams = getattr(settings.env, "random_streams", None)
    hint = f"The state of {spec_name(settings.env)} cannot be split: it has no random_streams."
    require(streams is not None, "PPO.redeal", "be false", settings.redeal, hint)
    for rank, state in states.items():
        for name, value in (state["env"] or {}).items():
            has_rows = value.ndim > 0 and len(value) == _num_envs(state)
            hint = f"Of rank {rank}, {name} in the state of {spec_name(settings.env)} has none."
            field, rule = "PPO.redeal", "be false without a row for each environment"
            require(name in streams or has_rows, field, rule, settings.redeal, hint)


def deal_rank(
    checkpoint: Mapping[str, Any],
    settings: PPOSettings,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """The state of one rank, with its share of all environments and new random streams.

    Args:
        checkpoint: A checkpoint of PPO that ``refuse_deal`` does not refuse.
        settings: Settings of the run that resumes from the checkpoint.
        rank: Number of this rank.
        world_size: Number of ranks of that run.
        device: Device of the environments.
    """
    own = checkpoint[STATE_KEY]
    states: list[dict[str, Any]] = [own["ranks"][former] for former in range(len(own["ranks"]))]
    begin, where = rank * settings.env.num_envs, f"iteration {own['iteration']} on {world_size}"

    def new_stream(purpose: str) -> Tensor:
        purpose = f"{purpose} from {where} ranks"
        return stream(settings.seed, rank=rank, purpose=purpose, device=device).get_state()

    def share(trees: Sequence[Any]) -> Any:
        return _rows(trees, begin, begin + settings.env.num_envs)

    envs = [state["env"] for state in states]
    streams: Collection[str] = getattr(settings.env, "random_streams", ())
    return {
        "acting": share([state["acting"] for state in states]),
        "env": None if None in envs else _deal_env(envs, streams, share, new_stream),
        "generators": [new_stream(purpose) for purpose in ("acting", "order")],
        "global_random": states[min(rank, len(states) - 1)]["global_random"],
    }


def _deal_env(
    envs: Sequence[Mapping[str, Tensor]],
    streams: Collection[str],
    share: Callable[[Sequence[Any]], Any],
    new_stream: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    return {
        name: new_stream(name) if name in streams else share([env[name] for env in envs])
        for name in envs[0]
    }


def _rows(trees: Sequence[Any], begin: int, end: int) -> Any:
    """Rows ``begin`` to ``end`` of tensors that are joined along ``B``; ``None`` stays."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {name: _rows([tree[name] for tree in trees], begin, end) for name in first}
    return torch.cat(list(trees))[begin:end].clone()


def _num_envs(state: Mapping[str, Any]) -> int:
    """Number of environments in the state of a rank."""
    return len(state["acting"]["discounted_return"])
