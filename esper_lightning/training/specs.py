"""Specs as plain data and back: how a checkpoint and ``config.yaml`` say what was trained.

The form is the command line's own: ``class_path`` and ``init_args``.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, cast

from esper_lightning.core.validate import require

__all__ = ["describe", "instantiate", "plain", "with_num_envs"]

Description = dict[str, Any]


def plain(value: object) -> Any:
    """Dataclasses as dicts and tuples as lists, all the way down; the rest as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in cast(Mapping[str, object], value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast(list[object], value)]
    return value


def describe(spec: object) -> Description:
    """Class and settings of a spec; settings are empty for one that is not a dataclass."""
    kind = type(spec)
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": plain(spec) if dataclasses.is_dataclass(spec) else {},
    }


def instantiate(description: Description, *, owner: str) -> Any:
    """The spec that ``describe`` described.

    Raises:
        ValueError: If its class cannot be imported.
    """
    path = str(description["class_path"])
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{owner} must be importable, got {path!r}. Pass {owner} yourself."
        ) from error
    settings = cast(dict[str, object], description["init_args"])
    return kind(**{key: _frozen(value) for key, value in settings.items()})


def with_num_envs(spec: Any, num_envs: int) -> Any:
    """The same environment with another number of copies.

    Raises:
        ValueError: If the spec is not a dataclass and has another number.
    """
    if spec.num_envs == num_envs:
        return spec
    hint = "Make the spec a dataclass, so that it can be copied with another num_envs."
    ok = dataclasses.is_dataclass(spec)
    require(ok, "PPO.eval_episodes", f"equal env.num_envs = {spec.num_envs}", num_envs, hint)
    return dataclasses.replace(spec, num_envs=num_envs)


def _frozen(value: object) -> object:
    """Lists as tuples, all the way down: what frozen dataclasses hold."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in cast(list[object], value))
    return value
