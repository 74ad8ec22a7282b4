"""Specs as plain data and back: how a checkpoint and ``config.yaml`` say what was trained.

The form is the command line's own: ``class_path`` and ``init_args``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from esper_lightning.core.errors import require
from esper_lightning.core.imports import import_object
from esper_lightning.envs.base import EnvSpec
from esper_lightning.envs.inspector import is_count
from esper_lightning.policies.base import PolicySpec
from esper_lightning.policies.encoders import EncoderSpec
from esper_lightning.ppo.extension import ExtensionSpec

__all__ = [
    "evaluation_spec",
    "first_difference",
    "require_specs",
    "spec_from_data",
    "spec_to_data",
    "to_data",
]

SpecData = dict[str, Any]
_FORM = {"class_path", "init_args"}
_PLAIN = (bool, int, float, str, type(None))
_OPAQUE = "repr()"


def to_data(value: object) -> Any:
    """Dataclasses as dicts and tuples as lists, all the way down; specs within with their class.

    What is not a number or text becomes its ``repr`` under a name that no setting has: it can be
    compared, and ``spec_from_data`` refuses it.
    """
    if isinstance(value, EncoderSpec | ExtensionSpec):
        return spec_to_data(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields_to_data(value)
    if isinstance(value, Mapping):
        return {key: to_data(item) for key, item in cast(Mapping[str, object], value).items()}
    if isinstance(value, list | tuple):
        return [to_data(item) for item in cast(list[object], value)]
    return value if isinstance(value, _PLAIN) else {_OPAQUE: repr(value)}


def first_difference(name: str, values: Sequence[Any]) -> tuple[str, list[Any]]:
    """The first setting in which plain data differ.

    Args:
        name: Name of the whole, with which that of the setting begins.
        values: Data from ``to_data``, one for each rank.

    Returns:
        Its dotted name, and its values; no values if all are the same.
    """
    if all(value == values[0] for value in values):
        return name, []
    if not all(isinstance(value, Mapping) for value in values):
        return name, list(values)
    mappings = cast(Sequence[Mapping[str, Any]], values)
    for key in dict.fromkeys(key for mapping in mappings for key in mapping):
        inner = name if key == "init_args" else f"{name}.{key}"
        found = first_difference(inner, [mapping.get(key) for mapping in mappings])
        if found[1]:
            return found
    return name, list(values)


def spec_to_data(spec: object) -> SpecData:
    """Class and settings of a spec; settings are empty for one that is not a dataclass."""
    kind = type(spec)
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": _fields_to_data(spec) if dataclasses.is_dataclass(spec) else {},
    }


def spec_from_data(description: SpecData, *, owner: str, kind: type) -> Any:
    """The spec that ``spec_to_data`` described.

    Args:
        description: Of the spec; nothing else than a spec is made from it.
        owner: Name of the setting, for the error.
        kind: What its class must be, ``EnvSpec`` or ``PolicySpec``.

    Raises:
        ValueError: If its class cannot be imported, is none of a spec, or takes other settings.
    """
    path = str(description["class_path"])
    settings = cast(dict[str, object], description["init_args"])
    try:
        found = import_object(path)
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise TypeError(f"it is no {kind.__name__}")
        return found(**{key: _frozen(value) for key, value in settings.items()})
    except ValueError:
        raise
    except Exception as error:  # whatever a class makes of settings that are not its own
        hint = f"Pass {owner} yourself."
        raise ValueError(f"{owner} must be one that {path} makes anew: {error}. {hint}") from error


def evaluation_spec(spec: EnvSpec, episodes: int | None) -> EnvSpec:
    """The same environment with a copy for each episode of an evaluation.

    Args:
        spec: Of the training environments.
        episodes: How many; ``None`` for 100, or as many as the spec has if it is not a dataclass
            with a field ``num_envs``, without which it cannot be copied with another number.

    Raises:
        ValueError: If the spec cannot be copied and has another number.
    """
    num_envs = spec.num_envs
    own = dataclasses.fields(cast(Any, spec)) if dataclasses.is_dataclass(spec) else ()
    copies = any(field.name == "num_envs" and field.init for field in own)
    if episodes is None:
        episodes = 100 if copies else num_envs
    if num_envs == episodes:
        return spec
    hint = "Make the spec a dataclass, so that it can be copied with another num_envs."
    require(copies, "PPO.eval_episodes", f"equal env.num_envs = {num_envs}", episodes, hint)
    return dataclasses.replace(cast(Any, spec), num_envs=episodes)


def require_specs(owner: str, env: object, policy: object) -> None:
    """Refuse what are no specs, in the name of ``owner``.

    Raises:
        ValueError: Naming the argument.
    """
    hint = "CartPole(num_envs=64), for example."
    ok = isinstance(env, EnvSpec) and not isinstance(env, type)
    require(ok, f"{owner}.env", "be an environment spec", env, hint)
    field, num_envs = f"{type(env).__name__}.num_envs", getattr(env, "num_envs", None)
    require(is_count(num_envs), field, "be an integer of at least 1", num_envs)
    ok = isinstance(policy, PolicySpec) and not isinstance(policy, EnvSpec | type)
    require(ok, f"{owner}.policy", "be a policy spec", policy, "MLP(), for example.")


def _fields_to_data(settings: Any) -> SpecData:
    fields = (field.name for field in dataclasses.fields(settings) if field.init)
    return {name: to_data(getattr(settings, name)) for name in fields}


def _frozen(value: object) -> object:
    """Lists as tuples and data of specs as specs, all the way down: what frozen dataclasses hold.

    Raises:
        TypeError: For a value of which only the ``repr`` was kept.
    """
    if isinstance(value, dict):
        fields = cast(dict[str, object], value)
        if _OPAQUE in fields:
            raise TypeError(f"{fields[_OPAQUE]} is not plain data")
        if fields.keys() == _FORM:
            return spec_from_data(fields, owner="A spec within", kind=EncoderSpec)
        return {key: _frozen(item) for key, item in fields.items()}
    if isinstance(value, list):
        return tuple(_frozen(item) for item in cast(list[object], value))
    return value
