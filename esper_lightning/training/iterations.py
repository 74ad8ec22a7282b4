"""The "data set" of PPO: numbers of iterations, since every iteration collects its own data.

Lightning takes a ``StopIteration`` for the end of a data set, wherever it comes from. The steps of
a module that derives from ``NeverStops`` raise none.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from lightning.pytorch import LightningModule

__all__ = ["Iterations", "NeverStops"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _must_not_stop(hook: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a hook so that a ``StopIteration`` of code that it calls becomes an error.

    Otherwise Lightning would begin the next epoch after a half-finished iteration, for ever. A
    context manager cannot do this: ``contextlib`` raises the ``StopIteration`` again.
    """

    @functools.wraps(hook)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return hook(*args, **kwargs)
        except StopIteration as error:
            message = f"{hook.__qualname__} called code that raised StopIteration"
            raise RuntimeError(message) from error

    return checked


class NeverStops(LightningModule):
    """A module in whose steps, also those of subclasses, a ``StopIteration`` is an error."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("training_step", "validation_step"):
            known = [
                vars(base).get(name) for base in cls.__mro__[1:] if issubclass(base, NeverStops)
            ]
            step = getattr(cls, name)  # of the class, or of another that stands before PPO
            if step not in (*known, getattr(LightningModule, name)):
                setattr(cls, name, _must_not_stop(step))


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
