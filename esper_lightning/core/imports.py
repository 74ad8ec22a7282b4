"""Objects by their import path, as settings and checkpoints name classes and functions."""

import importlib
from typing import Any

__all__ = ["import_object"]


def import_object(path: str) -> Any:
    """The object at ``package.module:name`` or ``package.module.name``.

    The name may lead through classes, as in ``package.module.Outer.Inner``.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If the module has no such name.
    """
    module, colon, names = path.partition(":")
    if colon:
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
        return found
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        if "." not in module:
            raise
        return getattr(import_object(module), name)
