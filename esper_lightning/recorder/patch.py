"""Temporary replacements of other objects' functions, which are undone in any order."""

from collections.abc import Callable
from typing import Any, cast

__all__ = ["Patch"]

_ABSENT = object()


class Patch:
    """A function that replaces an attribute of an object until ``undo``.

    Args:
        owner: Object, or module, that has the attribute.
        name: Name of the attribute.
        function: Function that is called in place of the attribute.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        self._lives = True
        self._previous: Any = vars(owner).get(name, _ABSENT)

        def patched(*args: Any, **kwargs: Any) -> Any:
            return (function if self._lives else self.original)(*args, **kwargs)

        patched.patch = self  # pyright: ignore[reportFunctionMemberAccess]
        self._patched = patched
        setattr(owner, name, patched)

    @property
    def original(self) -> Callable[..., Any]:
        """The attribute as it was before this patch, and before earlier patches that are undone."""
        previous = self._before()
        if previous is _ABSENT:
            return getattr(cast(Any, type(self._owner)), self._name).__get__(self._owner)
        return previous

    def undo(self) -> None:
        """Restore the attribute; where a later patch covers this one, it calls the original."""
        self._lives = False
        if vars(self._owner).get(self._name) is self._patched:
            previous = self._before()
            if previous is _ABSENT:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, previous)

    def _before(self) -> Any:
        previous = self._previous
        while isinstance(patch := getattr(previous, "patch", None), Patch) and not patch._lives:
            previous = patch._previous
        return previous
