"""Metrics of episodes, evaluations and environments: names, and means over iterations and ranks.

Axes: ``T`` step, ``B`` environment.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.errors import require
from esper_lightning.core.ranks import Ranks
from esper_lightning.core.shapes import Float
from esper_lightning.core.types import Rollout
from esper_lightning.envs.base import BatchedEnv, MeasuringEnv

__all__ = [
    "EVALUATION_METRICS",
    "EVAL_RETURN",
    "ROLLOUT_METRICS",
    "ROLLOUT_RETURN",
    "EpisodeSums",
    "RecentEpisodes",
    "evaluation_metrics",
    "mean_env_metrics",
    "rollout_metrics",
    "shown_in_progress_bar",
    "sum_episodes",
    "to_host",
]

ROLLOUT_RETURN = "rollout/episode_return_mean"
ROLLOUT_LENGTH = "rollout/episode_length_mean"
ROLLOUT_METRICS = (ROLLOUT_RETURN, ROLLOUT_LENGTH, "rollout/episodes")
"""Every metric of a history row about episodes."""
EVAL_RETURN = "eval/episode_return_mean"
EVALUATION_METRICS = (
    EVAL_RETURN,
    "eval/episode_return_std",
    "eval/episode_length_mean",
    "eval/episodes",
)
"""Every metric of an evaluation."""


class EpisodeSums(NamedTuple):
    """Sums over the episodes that ended in a rollout, in double precision."""

    episode_return: Float[Tensor, ""]
    episode_length: Float[Tensor, ""]
    episodes: Float[Tensor, ""]  # number of episodes that ended


class _IterationSums(NamedTuple):
    """Sums over the episodes that ended in an iteration, on the host."""

    episode_return: float = 0.0
    episode_length: float = 0.0
    episodes: float = 0.0  # number of episodes that ended


class RecentEpisodes:
    """Mean return and length over the latest iterations that together hold ``window`` episodes.

    Where fewer episodes have ended, all of them count. At most the last 64 iterations in which an
    episode ended are stored. They are stored on the host, which copies their sums anyway.

    Args:
        window: Number of episodes that the means should cover.
    """

    def __init__(self, window: int = 100) -> None:
        self._window = window
        self._sums: deque[_IterationSums] = deque(maxlen=64)  # the newest last

    def update(self, return_sum: float, length_sum: float, episodes: float) -> None:
        """Add the sums of one iteration.

        Args:
            return_sum: Sum of the returns of the episodes that ended.
            length_sum: Sum of their lengths in steps.
            episodes: Number of episodes that ended.
        """
        if episodes > 0:
            self._sums.append(_IterationSums(return_sum, length_sum, episodes))

    def means(self) -> tuple[float, float]:
        """Mean return and mean length; both are NaN while no episode has ended."""
        returns = lengths = number = 0.0
        for sums in reversed(self._sums):
            if number >= self._window:
                break
            returns += sums.episode_return
            lengths += sums.episode_length
            number += sums.episodes
        return (returns / number, lengths / number) if number else (math.nan, math.nan)

    def state(self) -> list[list[float]]:
        """The stored sums, for a checkpoint."""
        return [list(sums) for sums in self._sums]

    def load(self, state: list[list[float]]) -> None:
        """Continue from the sums of a checkpoint.

        Raises:
            ValueError: If ``state`` is not what the method ``state`` returned.
        """
        rule = "hold sums of returns, of lengths, and numbers of episodes"
        require(all(len(sums) == 3 for sums in state), "recent_episodes", rule, state[:1])
        self._sums = deque((_IterationSums(*sums) for sums in state), maxlen=64)


def sum_episodes(rollout: Rollout) -> EpisodeSums:
    """Sum the returns and lengths of the episodes that ended in a rollout."""
    ended = rollout.episode_length > 0
    episode_return = torch.where(ended, rollout.episode_return, 0.0)
    return EpisodeSums(
        episode_return=episode_return.double().sum(),
        episode_length=rollout.episode_length.double().sum(),
        episodes=ended.double().sum(),
    )


def to_host(metrics: Mapping[str, Float[Tensor, ""]]) -> dict[str, float]:
    """Copy every metric of an iteration to the host, in one transfer."""
    scalars = torch.stack([*metrics.values()])  # in double precision, as the sums of episodes are
    return dict(zip(metrics, cast(list[float], scalars.tolist()), strict=True))


def rollout_metrics(episodes: float, recent: RecentEpisodes) -> dict[str, float | int | None]:
    """Metrics of a history row about episodes; means are ``None`` while no episode has ended.

    Args:
        episodes: Number of episodes that ended in the iteration.
        recent: Episodes of the latest iterations, over which returns and lengths are averaged.
    """
    episode_return, episode_length = recent.means()
    known = not math.isnan(episode_return)
    means = (episode_return, episode_length) if known else (None, None)
    return dict(zip(ROLLOUT_METRICS, (*means, int(episodes)), strict=True))


def evaluation_metrics(
    episode_return: Float[Tensor, " N"], episode_length: Float[Tensor, " N"]
) -> dict[str, float]:
    """Metrics of the ``N`` episodes of an evaluation; the standard deviation is over episodes.

    Args:
        episode_return: Return of each episode.
        episode_length: Length of each episode, in steps.
    """
    values = (
        episode_return.mean().item(),
        episode_return.std(correction=0).item(),
        episode_length.mean().item(),
        float(episode_return.numel()),
    )
    return dict(zip(EVALUATION_METRICS, values, strict=True))


def shown_in_progress_bar(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a history row that progress bars show, under short names."""
    short = {"return": ROLLOUT_RETURN, "env_steps/s": "env_steps_per_s"}
    return {name: metrics[key] for name, key in short.items() if key in metrics}


def mean_env_metrics(
    env: BatchedEnv, ranks: Ranks, *, device: torch.device
) -> dict[str, Float[Tensor, ""]]:
    """Metrics of the environments over the latest rollout, averaged over ranks.

    Args:
        env: Environments of this rank; the result is empty if they have no metrics.
        ranks: All ranks of the run.
        device: Device of the result.
    """
    if not hasattr(env, "metrics"):  # ``isinstance`` of a protocol takes ten times as long
        return {}
    metrics = cast(MeasuringEnv, env).metrics()
    if getattr(env, "names_come_late", False):
        return _means_of_known(metrics, ranks, device)
    if not metrics:
        return {}
    total = ranks.sum(torch.stack(list(metrics.values())))
    return dict(zip(metrics, (total / ranks.size).unbind(), strict=True))


def _means_of_known(
    metrics: Mapping[str, Float[Tensor, ""]], ranks: Ranks, device: torch.device
) -> dict[str, Float[Tensor, ""]]:
    """Means over ranks that may know different names; with several ranks they go by the host."""
    if ranks.size == 1:
        return dict(metrics)
    mine = {name: metric.item() for name, metric in metrics.items()}
    everywhere: list[dict[str, float]] = ranks.gather_objects(mine)
    means: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for rank in everywhere for name in rank):
        values = [rank.get(name, math.nan) for rank in everywhere]
        known = [value for value in values if math.isfinite(value)]
        mean = sum(known) / len(known) if known else math.nan
        means[name] = torch.tensor(mean, device=device)
    return means
