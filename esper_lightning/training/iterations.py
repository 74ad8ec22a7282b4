"""The "data set" of PPO: numbers of iterations, since every iteration collects its own data."""

from collections.abc import Iterator
from typing import Any

__all__ = ["Iterations"]


class Iterations:
    """The numbers 0 to ``count - 1``, as a dataloader that Lightning accepts as resumable.

    Nothing depends on the numbers, and Lightning's own counters restore the position in the epoch.
    The dataloader therefore has no state to save. (If it were a ``DataLoader`` over
    ``range(count)``, Lightning would add a sampler that divides the numbers among ranks.)

    Args:
        count: Number of iterations in an epoch.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count))

    def state_dict(self) -> dict[str, Any]:
        """An empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, because there is no state."""
