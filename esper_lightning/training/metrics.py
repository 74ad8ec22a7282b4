"""Names of every metric, and what is accumulated over iterations. Axes: ``T`` step, ``B`` environment, ``W`` window."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from esper_lightning.core.shapes import Float, Int

__all__ = ["DEVICE_METRICS", "EVAL_RETURN", "ROLLOUT_RETURN", "EpisodeMeans", "RecentEpisodes"]

ROLLOUT_RETURN = "rollout/episode_return_mean"
EVAL_RETURN = "eval/episode_return_mean"
DEVICE_METRICS = (
    ROLLOUT_RETURN,
    "rollout/episode_length_mean",
    "rollout/episodes",
    "loss/policy",
    "loss/value",
    "loss/entropy",
    "policy/approx_kl",
    "policy/clip_fraction",
    "optim/grad_norm",
    "policy/explained_variance",
)
"""What an iteration computes on the device, in the order in which it is copied to the host."""


class EpisodeMeans(NamedTuple):
    """Means over recent episodes; NaN while no episode has ended."""

    episode_return: Float[Tensor, ""]
    episode_length: Float[Tensor, ""]


class RecentEpisodes(Metric):
    """Means over the most recent iterations that together hold ``window`` finished episodes, or all there are.

    The state is bounded: sums of the last 64 iterations in which an episode ended. Nothing synchronises.
    """

    higher_is_better = None
    full_state_update = False
    sums: Tensor  # [W, 3] sum of returns, sum of lengths, number of episodes; the newest iteration first

    def __init__(self, window: int = 100) -> None:
        super().__init__()
        self._window = window
        self.add_state(
            "sums", torch.zeros(64, 3, dtype=torch.float64), dist_reduce_fx="sum", persistent=True
        )

    @override
    def update(
        self, episode_return: Float[Tensor, "T B"], episode_length: Int[Tensor, "T B"]
    ) -> None:
        """Take in one iteration; a length of 0 means that no episode ended there."""
        ended = episode_length > 0
        newest = torch.stack(
            [
                torch.where(ended, episode_return, 0.0).double().sum(),
                episode_length.double().sum(),
                ended.double().sum(),
            ]
        )
        self.sums = torch.where(newest[2] > 0, torch.cat([newest[None], self.sums[:-1]]), self.sums)

    @override
    def compute(self) -> EpisodeMeans:
        """Means over the window."""
        episodes = self.sums[:, 2]
        newer = episodes.cumsum(0) - episodes
        total = torch.where((newer < self._window)[:, None], self.sums, 0.0).sum(0)
        return EpisodeMeans(total[0] / total[2], total[1] / total[2])
