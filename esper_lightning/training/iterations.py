"""The "dataset" of PPO: numbers of iterations, since every iteration makes its own data."""

from collections.abc import Iterator
from typing import Any

__all__ = ["Iterations"]


class Iterations:
    """The numbers 0 to ``count - 1``, as a dataloader that Lightning takes to be resumable.

    Nothing depends on the numbers and the position in the epoch is restored with Lightning's own
    counters, so there is no state to save. (A DataLoader over ``range(count)`` would be divided
    among ranks by an injected sampler.)
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count))

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""
