"""What environments around a simulator share, which cannot store the state of the simulator."""

from typing import Literal

from torch import Tensor

from esper_lightning.core.errors import require

__all__ = ["Lost", "StatelessEnv"]

Lost = Literal["error", "previous"]
"""How the end of a truncated episode is known where a simulator does not return it."""


class StatelessEnv:
    """The members of ``BatchedEnv`` for seeds, and for a state that cannot be stored.

    Args:
        name: Name of the task in errors.
        seed: Seed of the first reset; ``None`` where the simulator has been seeded already.
        reseeds: Whether a reset of the simulator takes a seed.
    """

    def __init__(self, name: str, seed: int | None, *, reseeds: bool = True) -> None:
        self._name, self._seed, self._reseeds = name, seed, reseeds

    def take_seed(self) -> int | None:
        """The seed of a reset that begins now; ``None`` until ``reseed`` gives another."""
        seed, self._seed = self._seed, None
        return seed

    def reseed(self, seed: int) -> bool:
        """Have the next reset seed all random numbers of the simulator, if a reset can do so.

        Returns:
            Whether a reset can; otherwise nothing has changed.
        """
        if self._reseeds:
            self._seed = seed
        return self._reseeds

    def state_dict(self) -> None:
        """``None``: such simulators cannot store their state, so a resumed run starts episodes."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Refuse any state, because such simulators cannot restore one.

        Raises:
            ValueError: Always.
        """
        require(False, self._name, "not be restored: it has no state_dict", sorted(state))
