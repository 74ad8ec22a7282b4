"""Specs of environments that have a name in a package of others: what such specs share."""

import dataclasses
import importlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from esper_lightning.core.errors import check_fields, require, require_int
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.envs.base import EnvSpec, how_fields

__all__ = ["SEEDS", "MissingPackageError", "NamedSpec", "needs_package", "require_package"]

SEEDS = 2**31
"""Number of seeds that every package takes."""
_LONGEST = 400  # characters of the words of a package
_probed: dict[str, EnvSpaces] = {}


@dataclass(frozen=True, kw_only=True)
class NamedSpec(EnvSpec):
    """A spec of environments by their name in a package.

    A subclass with fields of its own needs the line ``__hash__ = NamedSpec.__hash__``: a dataclass
    would hash ``kwargs``, which cannot be hashed.

    Attributes:
        id: Name of the environment.
        num_envs: Number of environments on each rank.
        kwargs: Arguments of the environment.
    """

    id: str
    num_envs: int = 64
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        check_fields(self)
        owner = type(self).__name__
        require_int(f"{owner}.num_envs", self.num_envs, minimum=1)
        require(bool(self.id), f"{owner}.id", "name a registered environment", self.id)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def name(self) -> str:
        """Name of the task in messages and run directories."""
        return self.id

    def probe(self, read: Callable[[], EnvSpaces]) -> EnvSpaces:
        """Spaces that ``read`` returned, called once in a process for each environment."""
        same = {"num_envs": 1} | dict.fromkeys(how_fields(self), 0)
        key = repr(dataclasses.replace(self, **same))
        if key not in _probed:
            _probed[key] = read()
        return _probed[key]

    def refuse(self, error: Exception, hint: str = "") -> ValueError:
        """The error for a package that cannot make the environment, with the package's words."""
        why = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
        way_out = f" {hint}" if hint and why.endswith(".") else f". {hint}" if hint else ""
        return ValueError(f"{type(self).__name__}.id={self.id!r} cannot be made: {why}{way_out}")


class MissingPackageError(ValueError):
    """Raised where a simulator's package is not installed; the message says what to install."""


def needs_package(
    spec: NamedSpec, package: str, install: str, error: Exception
) -> MissingPackageError:
    """The error for a package that is not installed; the way out comes first.

    Args:
        spec: Spec that needs the package.
        package: Import path of the package.
        install: What ``pip install`` takes.
        error: Error of the import.
    """
    owner, why = type(spec).__name__, " ".join(str(error).split())
    said = f"{owner}.id={spec.id!r} needs {package}: pip install {install}. ({why})"
    return MissingPackageError(said)


def require_package(spec: NamedSpec, package: str, install: str) -> Any:
    """A module of the package in which a spec names its environment.

    Args:
        spec: Spec that needs the package, for the error.
        package: Import path of the module.
        install: What ``pip install`` takes.

    Raises:
        MissingPackageError: If the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None  # it may be within
        raise needs_package(spec, (missing or package).partition(".")[0], install, error) from error
