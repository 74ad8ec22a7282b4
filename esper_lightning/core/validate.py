"""One form for every error about what a user wrote, *Owner.field must rule, got value. Hint.*."""

__all__ = ["require"]


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
