"""Episodes of a population of hosts, by the kind of host.

Axes: ``R`` trained policy, ``G`` fixed schedule, ``N`` host. A kind here is a number of classes, a
share of wrong labels and a width; hosts of a kind may differ in the rest.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_lightning.envs.morphogenesis.lifecycle import Op
from esper_lightning.envs.morphogenesis.population import Kinds
from esper_lightning.growth.play import Played

__all__ = ["Outcome", "best_for_kind", "kind_names", "kind_numbers"]

Scores = NDArray[np.float64]


class Outcome(NamedTuple):
    """What came of the hosts, one row for each trained policy of a name."""

    episode_return: Scores  # [R, N]
    test_accuracy: Scores
    grown_parameters: Scores
    grows: Scores  # 1 where a seed has germinated, else 0

    @classmethod
    def of(cls, plays: Sequence[Played]) -> "Outcome":
        """The outcome of several policies on the same hosts."""

        def stacked(rows: Iterable[Tensor]) -> Scores:
            return torch.stack([*rows]).double().numpy()

        return cls(
            stacked(one.episode_return for one in plays),
            stacked(one.test_accuracy for one in plays),
            stacked(one.grown_parameters for one in plays),
            stacked((one.course.action[:, :, 0] == Op.GERMINATE).any(0) for one in plays),
        )

    def choose(self, row: NDArray[np.int64]) -> "Outcome":
        """One row, which has for each host the numbers of the row named."""
        host = np.arange(len(row))
        return Outcome(*(field[row, host][None] for field in self))


def kind_numbers(kinds: Kinds) -> NDArray[np.int64]:
    """Number of the kind of each host, ``[N]``: the position of its name in ``kind_names``."""
    number = torch.zeros_like(kinds.classes)
    for values in _axes(kinds):
        choices = cast(Tensor, values.unique())
        number = number * len(choices) + torch.searchsorted(choices, values)
    return number.numpy()


def kind_names(kinds: Kinds) -> list[str]:
    """Names of all kinds, those of which there is no host among them."""
    axes = [
        cast(list[float], cast(Tensor, values.double().unique()).tolist())
        for values in _axes(kinds)
    ]
    return [
        f"{classes:.0f} classes, {100 * noise:.0f} % wrong labels, {100 * width:.0f} % wide"
        for classes, noise, width in itertools.product(*axes)
    ]


def best_for_kind(
    score: Scores, kind: NDArray[np.int64], *, without_itself: bool = False
) -> NDArray[np.int64]:
    """For each host, the schedule with the highest mean score over the hosts of its kind.

    Args:
        score: Scores ``[G, N]`` of each schedule on each host.
        kind: Number of the kind of each host.
        without_itself: Whether the mean is over the other hosts of the kind. The schedule is then
            no better for the host than chance and the kind make it; otherwise it is chosen with
            the host's own score in view.
    """
    chosen = np.zeros(len(kind), dtype=np.int64)
    for number in np.unique(kind):
        mine = score[:, kind == number]
        total = mine.sum(1, keepdims=True)
        if without_itself:
            total = total - mine
        chosen[kind == number] = np.broadcast_to(total, mine.shape).argmax(0)
    return chosen


def _axes(kinds: Kinds) -> tuple[Tensor, Tensor, Tensor]:
    return kinds.classes, kinds.label_noise, kinds.width
