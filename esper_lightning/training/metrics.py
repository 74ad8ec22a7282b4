"""Names of every metric, and what is accumulated over iterations.

Axes: ``T`` step, ``B`` environment, ``W`` window.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.core.types import Rollout
from esper_lightning.training.update import UpdateMetrics

__all__ = [
    "EVAL_RETURN",
    "ROLLOUT_RETURN",
    "EpisodeMeans",
    "RecentEpisodes",
    "evaluation_metrics",
    "iteration_figures",
    "shown_in_progress_bar",
    "to_host",
]

ROLLOUT_RETURN = "rollout/episode_return_mean"
ROLLOUT_LENGTH = "rollout/episode_length_mean"
EVAL_RETURN = "eval/episode_return_mean"
_COPIED = (
    ROLLOUT_RETURN,
    ROLLOUT_LENGTH,
    "rollout/episodes",
    "loss/policy",
    "loss/value",
    "loss/entropy",
    "policy/approx_kl",
    "policy/clip_fraction",
    "optim/grad_norm",
    "gradient_steps",
    "learner_finite",
    "policy/explained_variance",
    "healthy",
)
_NOT_REPORTED = ("gradient_steps", "learner_finite", "healthy")


class EpisodeMeans(NamedTuple):
    """Means over recent episodes; NaN while no episode has ended."""

    episode_return: Float[Tensor, ""]
    episode_length: Float[Tensor, ""]


class RecentEpisodes(Metric):
    """Means over the latest iterations that together hold ``window`` episodes, or all there are.

    The state is bounded: sums of the last 64 iterations in which an episode ended. Nothing
    synchronises.
    """

    higher_is_better = None
    full_state_update = False
    sums: Tensor  # [W, 3] sums of returns and lengths, number of episodes; the newest first

    def __init__(self, window: int = 100) -> None:
        super().__init__()
        self._window = window
        self.add_state("sums", torch.zeros(64, 3), dist_reduce_fx="sum", persistent=True)

    @override
    def update(
        self,
        episode_return: Float[Tensor, "T B"],
        episode_length: Int[Tensor, "T B"],
        *,
        where: Bool[Tensor, ""],
    ) -> None:
        """Take in one iteration, if ``where``; a length of 0 means that no episode ended there."""
        ended = episode_length > 0
        newest = torch.stack(
            [
                torch.where(ended, episode_return, 0.0).float().sum(),
                episode_length.float().sum(),
                ended.float().sum(),
            ]
        )
        self.sums = torch.where(
            where & (newest[2] > 0), torch.cat([newest[None], self.sums[:-1]]), self.sums
        )

    @override
    def compute(self) -> EpisodeMeans:
        """Means over the window."""
        episodes = self.sums[:, 2]
        newer = episodes.cumsum(0) - episodes
        total = torch.where((newer < self._window)[:, None], self.sums, 0.0).sum(0)
        return EpisodeMeans(total[0] / total[2], total[1] / total[2])


def to_host(
    recent: EpisodeMeans,
    rollout: Rollout,
    metrics: UpdateMetrics,
    variance: Float[Tensor, ""],
    healthy: Bool[Tensor, ""],
) -> dict[str, float]:
    """Everything that the host wants to know of an iteration, in one copy."""
    episodes = (rollout.episode_length > 0).sum()
    scalars = [*recent, episodes, *metrics, variance, healthy]
    values = cast(list[float], torch.stack([scalar.float() for scalar in scalars]).tolist())
    return dict(zip(_COPIED, values, strict=True))


def iteration_figures(host: Mapping[str, float]) -> dict[str, float | int | None]:
    """The figures of a history row; means over episodes are ``None`` while none has ended."""
    figures: dict[str, float | int | None] = {
        name: value for name, value in host.items() if name not in _NOT_REPORTED
    }
    figures["rollout/episodes"] = int(host["rollout/episodes"])
    for name in (ROLLOUT_RETURN, ROLLOUT_LENGTH):
        if math.isnan(host[name]):
            figures[name] = None
    return figures


def evaluation_metrics(
    episode_return: Float[Tensor, " N"], episode_length: Float[Tensor, " N"]
) -> dict[str, float]:
    """Summary of ``N`` evaluation episodes; the standard deviation is over episodes."""
    return {
        EVAL_RETURN: episode_return.mean().item(),
        "eval/episode_return_std": episode_return.std(correction=0).item(),
        "eval/episode_length_mean": episode_length.mean().item(),
        "eval/episodes": float(episode_return.numel()),
    }


def shown_in_progress_bar(metrics: Mapping[str, float]) -> dict[str, float]:
    """What bars show of a row, under short names."""
    short = {"return": ROLLOUT_RETURN, "env_steps/s": "env_steps_per_s"}
    return {name: metrics[key] for name, key in short.items() if key in metrics}
