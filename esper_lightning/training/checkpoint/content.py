"""The content of a whole checkpoint of PPO, by names and types, and the search for misfits."""
# The types of a checkpoint's content are not known: any program may have written the file.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from esper_lightning.core.errors import require
from esper_lightning.forensics.reading import refuse_unbounded

__all__ = [
    "COUNT",
    "STATE_KEY",
    "find_misfit",
    "refuse_not_ours",
    "refuse_not_resumable",
    "refuse_not_whole",
]

STATE_KEY = "esper_lightning"
"""Key of a checkpoint's entry for counters, environments and random streams of PPO."""

COUNT = "a number of at least 0"
"""Shape, for ``find_misfit``, of a number that counts something."""
_PLAIN = "plain data"
_SPEC = {"class_path": str, "init_args": {"*": _PLAIN}}
_OURS: dict[str, Any] = {
    "pytorch-lightning_version": str,
    "state_dict": {"*": Tensor},
    "hyper_parameters": {
        "env": _SPEC,
        "policy": _SPEC,
        "ppo": {"normalize_obs": bool, "normalize_reward": bool, "*": _PLAIN},
        "*": _PLAIN,
    },
    STATE_KEY: {
        **dict.fromkeys(("iteration", "env_steps", "gradient_steps", "world_size"), int),
        "train_time_s": COUNT,
        "recent_episodes": [[(int, float)]],
        "ranks": dict,
    },
}
_TO_RESUME: dict[str, Any] = {
    **dict.fromkeys(("epoch", "global_step"), int),
    "callbacks": {"*": object},
    "loops": {"fit_loop": {"*": object}, "*": object},
    "lr_schedulers": list,
    "optimizer_states": [{"state": dict, "param_groups": [{"params": [int], "*": object}]}],
}
_RANK: dict[str, Any] = {
    "acting": {"*": object},
    "generators": [Tensor],
    "global_random": {"torch": Tensor, "*": object},
}
_VERSION = re.compile(r"\d+(\.\d+){1,3}((a|b|rc|\.dev|\.post)\d+)?(\+[a-z0-9.]+)?")


def refuse_not_ours(checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint that another module wrote.

    Args:
        checkpoint: Content of a checkpoint.
        path: Path of the checkpoint, for the error.

    Raises:
        ValueError: If the checkpoint has no entry of PPO. The error names ``path``.
    """
    require(STATE_KEY in checkpoint, "ckpt_path", "name a checkpoint of PPO", path)


def refuse_not_whole(checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint in which an entry of PPO is missing or has another type.

    Args:
        checkpoint: Content of a checkpoint.
        path: Path of the checkpoint, for the error.

    Raises:
        ValueError: If an entry does not fit. The error names ``path`` and the first such entry.
    """
    _refuse_misfit(checkpoint, _OURS, path)
    extensions = checkpoint["hyper_parameters"].get("extensions", [])
    _refuse_misfit(extensions, [_SPEC], path, "hyper_parameters.extensions")
    version = checkpoint["pytorch-lightning_version"]
    rule = "be written by a version of Lightning"
    require(_VERSION.fullmatch(version) is not None, "ckpt_path", rule, path, f"Not {version!r}.")


def refuse_not_resumable(checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint in which an entry is missing that training needs to be resumed.

    Args:
        checkpoint: Content of a checkpoint.
        path: Path of the checkpoint, for the error.

    Raises:
        ValueError: If an entry does not fit. The error names ``path`` and the first such entry.
    """
    _refuse_misfit(checkpoint, _TO_RESUME, path)
    for rank, state in checkpoint[STATE_KEY]["ranks"].items():
        _refuse_misfit(state, _RANK, path, f"{STATE_KEY}.ranks.{rank}")


def _refuse_misfit(value: Any, shape: Any, path: str, name: str = "") -> None:
    misfit = find_misfit(value, shape, name)
    rule = "hold a whole checkpoint of PPO"
    require(misfit is None, "ckpt_path", rule, path, f"{misfit}.")


def find_misfit(value: Any, shape: Any, name: str) -> str | None:
    """The first entry of a value that does not have a shape, in words; ``None`` if all do.

    A shape is a type (``int`` stands for a count), a list or dictionary of shapes, or one of the
    words ``COUNT`` and ``_PLAIN``. A list holds one shape for all entries. In a dictionary the key
    ``*`` stands for all further names.

    Args:
        value: Value to check.
        shape: Shape that the value must have.
        name: Dotted name of the value, for the result.
    """
    if isinstance(shape, dict):
        return _misfit_in_dictionary(value, cast(dict[str, Any], shape), name)
    if isinstance(shape, list):
        if not isinstance(value, list | tuple):
            return f"{name} is no list"
        entries = enumerate(cast(Sequence[Any], value))
        found = (find_misfit(entry, shape[0], f"{name}.{i}") for i, entry in entries)
        return next(filter(None, found), None)
    if shape is _PLAIN:
        return _not_plain(value, name)
    if shape in (COUNT, int):
        kinds = int if shape is int else int | float
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        return None if is_number and 0 <= value < 1e18 else f"{name} is no count"
    return None if isinstance(value, shape) else f"{name} is a {type(value).__name__}"


def _misfit_in_dictionary(value: Any, shape: dict[str, Any], name: str) -> str | None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return f"{name} is no dictionary by names"
    for key in dict.fromkeys([*shape, *value]):
        if key == "*":
            continue
        inner = f"{name}.{key}" if name else key
        if key not in value:
            return f"{inner} is missing"
        if found := find_misfit(value[key], shape.get(key, shape.get("*", object)), inner):
            return found
    return None


def _not_plain(value: Any, name: str) -> str | None:
    try:
        refuse_unbounded(value)
    except ValueError as error:
        return f"{name}: {error}"
    level = [value]
    while level:
        entry = level.pop()
        if isinstance(entry, Mapping):
            level += [*entry.keys(), *entry.values()]
        elif isinstance(entry, list | tuple):
            level += entry
        elif not (entry is None or isinstance(entry, bool | int | float | str)):
            return f"{name} holds a {type(entry).__name__}"
    return None
