"""Specs as plain data and back, for checkpoints and ``config.yaml``.

The plain data have the form of the command line: ``class_path`` and ``init_args``.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, cast, get_origin

from esper_lightning.core.errors import Words, require
from esper_lightning.core.imports import import_object
from esper_lightning.envs.base import EnvSpec, takes_num_envs
from esper_lightning.envs.inspector import is_count
from esper_lightning.policies.base import PolicySpec
from esper_lightning.policies.encoders import EncoderSpec
from esper_lightning.ppo.extension import ExtensionSpec
from esper_lightning.training.annotations import (
    annotations,
    dataclass_of,
    entry_kinds,
    is_named_by_text,
    item_kinds,
    named_by_text,
    options_of,
)

__all__ = [
    "StoredSpec",
    "episodes_each",
    "evaluation_spec",
    "first_difference",
    "refuse_opaque",
    "require_specs",
    "spec_from_data",
    "spec_to_data",
    "to_data",
    "with_defaults",
]

SpecData = dict[str, Any]
_FORM = {"class_path", "init_args"}
_PLAIN = (bool, int, float, str)
_OPAQUE = "repr()"
_EVAL_EPISODES = 100
_WITHIN = (EncoderSpec, EnvSpec, ExtensionSpec, PolicySpec)
"""Kinds of specs that may be settings of other specs."""


class StoredSpec:
    """A stand-in for a spec that cannot be built, with the plain data of that spec.

    Attributes:
        data: Plain data of the spec.
    """

    data: SpecData


def to_data(value: object, kind: Any = None) -> Any:
    """Plain data of a setting: dataclasses become dicts and tuples become lists, at all depths.

    A member of an enum becomes its name, a path becomes text, and a dataclass becomes its fields,
    where the annotation names the class. A spec within becomes a dict with its class. Any other
    value that is not a number or text becomes its ``repr`` under a name that no setting has, and so
    does a mapping with such a key. Such a value can be compared with others, but ``spec_from_data``
    refuses it. The same is true of a policy spec within that does not derive from ``PolicySpec``.

    Args:
        value: Value of the setting.
        kind: Annotation of the setting; ``None`` for a setting that is not rebuilt by annotations.
    """
    if is_named_by_text(value, kind):
        return value.name if isinstance(value, Enum) else str(value)
    if _is_spec_within(type(value)):
        return spec_to_data(value)
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, type)
    is_known = kind is None or dataclass_of(kind) is type(value)
    if is_data and is_known and not isinstance(value, PolicySpec):
        return _fields_to_data(value)
    if isinstance(value, Mapping):
        return _mapping_to_data(cast(Mapping[object, object], value), kind)
    if isinstance(value, list | tuple):
        listed = cast(Sequence[object], value)
        return [*map(to_data, listed, item_kinds(kind, len(listed)))]
    return _plain(value)


def first_difference(name: str, values: Sequence[Any]) -> tuple[str, list[Any]]:
    """The first setting in which plain data differ.

    Args:
        name: Name of the plain data, with which the name of the setting begins.
        values: Plain data from ``to_data``, one for each rank.

    Returns:
        The dotted name of the setting, and its value for each rank. The list of values is empty if
        all data are the same.
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


def refuse_opaque(name: str, data: Any) -> None:
    """Refuse plain data with a value of which only the ``repr`` was stored.

    Args:
        name: Dotted name of the setting to which the plain data belong.
        data: Plain data of the setting.

    Raises:
        ValueError: If there is such a value; the error names its setting.
    """
    if isinstance(data, Mapping):
        fields = cast(Mapping[str, Any], data)
        rule, hint = "be plain data to be stored in a checkpoint", "Rebuild the model in Python."
        require(_OPAQUE not in fields, name, rule, Words(fields.get(_OPAQUE)), hint)
        for key, value in fields.items():
            refuse_opaque(name if key == "init_args" else f"{name}.{key}", value)
    elif isinstance(data, list):
        for value in cast(list[Any], data):
            refuse_opaque(name, value)


def spec_to_data(spec: object) -> SpecData:
    """Plain data of a spec: its class and its settings.

    The settings are empty for a spec that is not a dataclass.
    """
    if isinstance(spec, StoredSpec):
        return spec.data
    kind = type(spec)
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": _fields_to_data(spec) if dataclasses.is_dataclass(spec) else {},
    }


def with_defaults(data: Any, own: object, kind: Any = None) -> Any:
    """Plain data of a spec with the defaults of settings that an earlier version did not have.

    Args:
        data: Plain data, of which those of a spec of another class are returned unchanged.
        own: Spec whose class has the settings.
        kind: Annotation of the setting that the plain data belong to; ``None`` for a spec.
    """
    is_spec = dataclasses.is_dataclass(own) and not isinstance(own, type)
    # Earlier versions stored no members of enums and no paths, and dataclasses of any kind.
    if data == {_OPAQUE: repr(own)} or (is_spec and data == _fields_to_data(own)):
        return to_data(own, kind)
    if not (is_spec and isinstance(data, Mapping) and {*cast(SpecData, data)} == _FORM):
        return cast(Any, data)
    stored, found = cast(SpecData, data), type(own)
    settings: SpecData = dict(stored["init_args"])
    if stored["class_path"] != f"{found.__module__}.{found.__qualname__}":
        return stored
    kinds = annotations(found)
    for field in dataclasses.fields(cast(Any, own)):
        name, of_field = field.name, kinds.get(field.name, object)
        if name in settings:
            settings[name] = with_defaults(settings[name], getattr(own, name), of_field)
        elif field.init and field.default is not dataclasses.MISSING:
            settings[name] = to_data(field.default, of_field)
        elif field.init and field.default_factory is not dataclasses.MISSING:
            settings[name] = to_data(field.default_factory(), of_field)
    return {"class_path": stored["class_path"], "init_args": settings}


def spec_from_data(description: SpecData, *, owner: str, kind: type | None) -> Any:
    """A spec rebuilt from the plain data that ``spec_to_data`` returned.

    Nothing but a spec is ever built from the data.

    Args:
        description: Plain data of the spec.
        owner: Name of the setting, for the error.
        kind: Class of which the spec must be: ``EnvSpec``, ``PolicySpec`` or ``ExtensionSpec``.
            ``None`` for a setting of another spec, which may be a spec of any kind.

    Raises:
        ValueError: If the class cannot be imported, is not that of a spec, or takes other settings.
    """
    path = str(description["class_path"])
    settings = cast(dict[str, object], description["init_args"])
    try:
        found = import_object(path)
        is_class = isinstance(found, type)
        fits = is_class and (_is_spec_within(found) if kind is None else issubclass(found, kind))
        if not fits:
            names = [one.__name__ for one in (_WITHIN if kind is None else (kind,))]
            raise TypeError(f"it is no {' or '.join(names)}")
        build: Any = found
        if not dataclasses.is_dataclass(found) and len(inspect.signature(build).parameters) > 0:
            raise TypeError("it is no dataclass, so its settings were not stored")
        return build(**_arguments(build, settings))
    except ValueError:
        raise
    except Exception as error:  # a class may raise anything for settings that are not its own
        hint = f"Pass {owner} yourself."
        raise ValueError(f"{owner} must be a spec that {path} builds: {error}. {hint}") from error


def evaluation_spec(spec: EnvSpec, episodes: int | None) -> EnvSpec:
    """Spec of the environments of an evaluation.

    A spec with a method ``evaluation_spec`` decides itself. All other specs are copied with one
    environment for each episode.

    Args:
        spec: Spec of the training environments.
        episodes: Number of episodes. ``None`` means 100, or as many as the spec has environments if
            the spec cannot be copied. (A spec can be copied with another number of environments if
            it is a dataclass with a field ``num_envs``.)

    Raises:
        ValueError: If the spec cannot be copied and its ``num_envs`` is not ``episodes``.
    """
    own_rule = getattr(spec, "evaluation_spec", None)
    if callable(own_rule):
        return cast(EnvSpec, own_rule(_EVAL_EPISODES if episodes is None else episodes))
    num_envs = spec.num_envs
    copies = takes_num_envs(spec)
    if episodes is None:
        episodes = _EVAL_EPISODES if copies else num_envs
    if num_envs == episodes:
        return spec
    hint = "Make the spec a dataclass, so that it can be copied with another num_envs."
    require(copies, "PPO.eval_episodes", f"equal env.num_envs = {num_envs}", episodes, hint)
    try:
        return dataclasses.replace(cast(Any, spec), num_envs=episodes)
    except TypeError as error:
        raise ValueError(f"{type(spec).__name__} must take num_envs again: {error}.") from error


def episodes_each(spec: EnvSpec, episodes: int | None) -> int:
    """Number of episodes that each environment of an evaluation plays.

    All environments together play at least ``episodes`` episodes.

    Args:
        spec: Spec from ``evaluation_spec``.
        episodes: Number of episodes of the evaluation, as passed to ``evaluation_spec``.
    """
    if episodes is None:
        has_rule = callable(getattr(spec, "evaluation_spec", None))
        episodes = _EVAL_EPISODES if has_rule else spec.num_envs
    return -(-episodes // spec.num_envs)


def require_specs(owner: str, env: object, policy: object) -> None:
    """Refuse arguments that are not specs.

    Args:
        owner: Name of the function or class that got the arguments, for the error.
        env: Argument that must be an environment spec.
        policy: Argument that must be a policy spec.

    Raises:
        ValueError: If an argument is not a spec. The error names the argument.
    """
    hint = "CartPole(num_envs=64), for example."
    ok = isinstance(env, EnvSpec) and not isinstance(env, type)
    require(ok, f"{owner}.env", "be an environment spec", env, hint)
    field, num_envs = f"{type(env).__name__}.num_envs", getattr(env, "num_envs", None)
    require(is_count(num_envs), field, "be an integer of at least 1", num_envs)
    ok = isinstance(policy, PolicySpec) and not isinstance(policy, EnvSpec | type)
    require(ok, f"{owner}.policy", "be a policy spec", policy, "MLP(), for example.")


def _is_spec_within(kind: type) -> bool:
    """Whether objects of a class, as settings of a spec, are specs.

    Such a spec must derive from the class of its kind: any class with a method ``build`` passes for
    a policy spec, and a checkpoint must not name any such class. Environments have more methods by
    which to know them.
    """
    return any(each in kind.__mro__ for each in _WITHIN) or issubclass(kind, EnvSpec)


def _plain(value: Any) -> Any:
    """A number or text without a class of its own, such as one of NumPy; else the ``repr``."""
    bases: list[Any] = [base for base in _PLAIN if isinstance(value, base)]
    if value is None or (bases and not isinstance(value, Enum)):
        return bases[0](value) if bases else None
    return {_OPAQUE: repr(value)}


def _fields_to_data(settings: Any) -> SpecData:
    fields = (field.name for field in dataclasses.fields(settings) if field.init)
    kinds = annotations(type(settings))
    return {name: to_data(getattr(settings, name), kinds.get(name, object)) for name in fields}


def _mapping_to_data(mapping: Mapping[object, object], kind: Any) -> dict[Any, Any]:
    of_key, of_item = entry_kinds(kind)
    keys = [_hashable(to_data(key, of_key)) for key in mapping]
    items = [to_data(item, of_item) for item in mapping.values()]
    try:
        return dict(zip(keys, items, strict=True))
    except TypeError:  # a key is no plain data: only its ``repr`` is
        return _plain(mapping)


def _hashable(data: Any) -> Any:
    """Plain data as a key of a mapping, where lists must be tuples."""
    return tuple(map(_hashable, cast(list[Any], data))) if isinstance(data, list) else data


def _arguments(kind: Any, settings: Mapping[str, object]) -> dict[str, object]:
    """The arguments with which plain data build a dataclass."""
    kinds = annotations(kind)
    return {name: _frozen(value, kinds.get(name)) for name, value in settings.items()}


def _frozen(value: object, kind: Any = None) -> object:
    """The value of a frozen dataclass for plain data: lists become tuples, at all depths.

    Plain data of specs become specs. Where the annotation names a dataclass, an enum, a list or
    paths, the value is of that kind.

    Args:
        value: Plain data of the value.
        kind: Annotation of the value; ``None`` if it is not known.

    Raises:
        TypeError: If only the ``repr`` of a value was stored.
        KeyError: If an enum has no member of a name that was stored.
    """
    if isinstance(value, dict):
        fields = cast(dict[str, object], value)
        if _OPAQUE in fields:
            raise TypeError(f"{fields[_OPAQUE]} is not plain data")
        if fields.keys() == _FORM:
            return spec_from_data(fields, owner="A spec", kind=None)
        build: Any = dataclass_of(kind)
        if build is not None:
            return build(**_arguments(build, fields))
        of_key, of_item = entry_kinds(kind)
        return {_frozen(key, of_key): _frozen(item, of_item) for key, item in fields.items()}
    if isinstance(value, list | tuple):  # a tuple is a key
        listed = cast(Sequence[object], value)
        items = map(_frozen, listed, item_kinds(kind, len(listed)))
        lists = [get_origin(option) or option for option in options_of(kind)]
        return list(items) if list in lists and tuple not in lists else tuple(items)
    named = named_by_text(kind)
    if named is None or not isinstance(value, str):
        return value
    return named[value] if issubclass(named, Enum) else named(value)
