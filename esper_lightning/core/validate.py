"""One form for every error about what a user wrote, *Owner.field must rule, got value. Hint.*."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NonFiniteError", "require", "require_int"]


class NonFiniteError(ValueError):
    """A NaN or an infinity where training cannot go on.

    Attributes:
        phase: What was going on: ``rollout``, ``update``, or ``training_step``.
        tensors: Names of what was not finite.
        environments: Indices of the environments concerned, if that is known.
        minibatch: Tensors by name on which it can be seen again.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: str,
        tensors: Sequence[str] = (),
        environments: Sequence[int] = (),
        minibatch: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.phase, self.tensors, self.environments = phase, list(tensors), list(environments)
        self.minibatch = minibatch


def require(ok: bool, field: str, rule: str, got: object, hint: str = "") -> None:
    """Raise unless ``ok``.

    Args:
        ok: Whether the value obeys the rule.
        field: The setting as the user knows it, ``Owner.field``.
        rule: What must hold, to follow the word "must".
        got: The offending value.
        hint: A sentence that helps to choose a better value.

    Raises:
        ValueError: ``{field} must {rule}, got {got}. {hint}``
    """
    if not ok:
        raise ValueError(f"{field} must {rule}, got {got!r}." + (f" {hint}" if hint else ""))


def require_int(field: str, value: object, *, minimum: int) -> None:
    """Raise unless it is an integer, which a bool is not, and great enough.

    Raises:
        ValueError: As ``require`` does.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    require(is_int, field, "be an integer", value)
    assert isinstance(value, int)
    require(value >= minimum, field, f"be at least {minimum}", value)
