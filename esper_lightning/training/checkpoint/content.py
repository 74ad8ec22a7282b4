"""The content of a whole checkpoint of PPO, by names and types, and the search for misfits."""
# The types of a checkpoint's content are not known: any program may have written the file.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch import Tensor

from esper_lightning.core.errors import require
from esper_lightning.core.seeding import why_not_restorable
from esper_lightning.forensics.reading import refuse_unbounded

__all__ = [
    "COUNT",
    "STATE_KEY",
    "find_misfit",
    "is_extra",
    "refuse_not_ours",
    "refuse_not_resumable",
    "refuse_not_whole",
]

STATE_KEY = "esper_lightning"
"""Key of a checkpoint's entry for counters, environments and random streams of PPO."""

COUNT = "a number of at least 0"
"""Shape, for ``find_misfit``, of a number that counts something."""
_NUMBER = "a finite number"
_HUGE = 1e300  # an integer beyond it may be no float
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
        "recent_episodes": [[_NUMBER]],
        "ranks": dict,
    },
}
_COUNTS = {which: {"ready": int, "completed": int, "*": int} for which in ("total", "current")}
_BATCHES = {**_COUNTS, "is_last_batch": bool}
_OPTIMIZATION = "epoch_loop.automatic_optimization"
_TO_RESUME: dict[str, Any] = {
    **dict.fromkeys(("epoch", "global_step"), int),
    "callbacks": {"*": dict},
    "loops": {
        "fit_loop": {  # the names are those of Lightning's loops
            "state_dict": {"combined_loader": [dict]},
            "epoch_progress": _COUNTS,
            "epoch_loop.state_dict": {"*": int},
            "epoch_loop.batch_progress": _BATCHES,
            "epoch_loop.scheduler_progress": _COUNTS,
            f"{_OPTIMIZATION}.state_dict": dict,
            f"{_OPTIMIZATION}.optim_progress": {
                "optimizer": {"step": _COUNTS, "zero_grad": _COUNTS}
            },
            "epoch_loop.manual_optimization.state_dict": dict,
            "epoch_loop.manual_optimization.optim_step_progress": _COUNTS,
            "epoch_loop.val_loop.state_dict": dict,
            "epoch_loop.val_loop.batch_progress": _BATCHES,
        },
        "*": object,
    },
    "lr_schedulers": list,
    "optimizer_states": [{"state": dict, "param_groups": [{"params": [int], "*": _PLAIN}]}],
}
_CHECKPOINTS = {
    **dict.fromkeys(("best_model_score", "current_score", "kth_value"), (Tensor, NoneType)),
    **dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), str),
    "best_k_models": {"*": Tensor},
}
_CALLBACKS: dict[type[Callback], Any] = {  # states of Lightning's callbacks
    ModelCheckpoint: _CHECKPOINTS,
    EarlyStopping: {
        **dict.fromkeys(("wait_count", "stopped_epoch", "patience"), int),
        "best_score": Tensor,
    },
    Timer: {"time_elapsed": {"*": COUNT}},
}
_EXTRA = "_extra_state"  # by which a module of the user's saves more than tensors
_RANK: dict[str, Any] = {
    "acting": {
        "obs": object,
        **dict.fromkeys(("action_mask", "memory"), (Tensor, NoneType)),
        "discounted_return": Tensor,
    },
    "env": object,
    "generators": [Tensor],
    "global_random": {"torch": Tensor, "python": (list, tuple), "numpy": list, "*": object},
}
_STAGES: dict[str, Any] = {  # which checkpoints of earlier versions lack
    "program": {"*": str},
    "states": {"*": {"slower": bool, "kinds": [str], "counts": [int], "values": {"*": str}}},
}
_STREAMS = 2  # of exploration, and of the order of samples
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
    state = checkpoint.get("state_dict")
    if isinstance(state, Mapping):
        state = {name: value for name, value in state.items() if not is_extra(name)}
        checkpoint = {**checkpoint, "state_dict": state}
    _refuse_misfit(checkpoint, _OURS, path)
    extensions = checkpoint["hyper_parameters"].get("extensions", [])
    _refuse_misfit(extensions, [_SPEC], path, "hyper_parameters.extensions")
    version = checkpoint["pytorch-lightning_version"]
    rule = "be written by a version of Lightning"
    require(_VERSION.fullmatch(version) is not None, "ckpt_path", rule, path, f"Not {version!r}.")


def is_extra(name: object) -> bool:
    """Whether an entry of a ``state_dict`` is what a module's ``get_extra_state`` returned."""
    return isinstance(name, str) and name.split(".")[-1] == _EXTRA


def refuse_not_resumable(
    checkpoint: Mapping[str, Any], path: str, *, callbacks: Sequence[Callback] = ()
) -> None:
    """Refuse a checkpoint in which an entry is missing that training needs to be resumed.

    Args:
        checkpoint: Content of a checkpoint.
        path: Path of the checkpoint, for the error.
        callbacks: Callbacks that will load their states. The states of Lightning's own classes are
            known; those of other classes are their own matter.

    Raises:
        ValueError: If an entry does not fit. The error names ``path`` and the first such entry.
    """
    _refuse_misfit(checkpoint, _TO_RESUME, path)
    for callback in callbacks:
        state = checkpoint["callbacks"].get(callback.state_key, {})
        for kind, fields in _CALLBACKS.items():
            if isinstance(callback, kind):
                known = {field: shape for field, shape in fields.items() if field in state}
                name = f"callbacks.{type(callback).__name__}"
                _refuse_misfit(state, known or dict, path, name)
    for rank, state in checkpoint[STATE_KEY]["ranks"].items():
        name = f"{STATE_KEY}.ranks.{rank}"
        _refuse_misfit(state, _RANK, path, name)
        if "stages" in state:
            _refuse_misfit(state["stages"], _STAGES, path, f"{name}.stages")
        if state["env"] is not None:
            _refuse_misfit(state["env"], {"*": Tensor}, path, f"{name}.env")
        obs = state["acting"]["obs"]
        groups = {"*": Tensor} if isinstance(obs, Mapping) else Tensor
        _refuse_misfit(obs, groups, path, f"{name}.acting.obs")
        rule, streams = "hold a whole checkpoint of PPO", len(state["generators"])
        hint = f"{name}.generators has {streams} states, not {_STREAMS}."
        require(streams == _STREAMS, "ckpt_path", rule, path, hint)
        why = why_not_restorable(state["global_random"], state["generators"])
        require(why is None, "ckpt_path", rule, path, f"{name}.{why}.")


def _refuse_misfit(value: Any, shape: Any, path: str, name: str = "") -> None:
    misfit = find_misfit(value, shape, name)
    rule = "hold a whole checkpoint of PPO"
    require(misfit is None, "ckpt_path", rule, path, f"{misfit}.")


def find_misfit(value: Any, shape: Any, name: str) -> str | None:
    """The first entry of a value that does not have a shape, in words; ``None`` if all do.

    A shape is a type (``int`` stands for a count), a list or dictionary of shapes, or one of the
    words ``COUNT``, ``_NUMBER`` and ``_PLAIN``. A list holds one shape for all entries. In a
    dictionary the key ``*`` stands for all further names.

    Args:
        value: Value to check.
        shape: Shape that the value must have.
        name: Dotted name of the value, for the result.
    """
    if isinstance(value, Tensor) and value.layout != torch.strided:
        return f"{name} is a sparse tensor"
    if isinstance(shape, dict):
        return _misfit_in_dictionary(value, cast(dict[str, Any], shape), name)
    if isinstance(shape, list):
        return _misfit_in_list(value, cast(list[Any], shape), name)
    if shape is _PLAIN:
        return _not_plain(value, name)
    if shape in (COUNT, int, _NUMBER):
        kinds = int if shape is int else int | float
        least, most, what = (-math.inf, math.inf, "finite number")
        if shape is not _NUMBER:
            least, most, what = -1e-9, 1e18, "count"
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        fits = is_number and least < value < most and abs(value) < _HUGE
        return None if fits else f"{name} is no {what}"
    return None if isinstance(value, shape) else f"{name} is a {type(value).__name__}"


def _misfit_in_list(value: Any, shape: list[Any], name: str) -> str | None:
    if not isinstance(value, list | tuple):
        return f"{name} is no list"
    entries = enumerate(cast(Sequence[Any], value))
    found = (find_misfit(entry, shape[0], f"{name}.{i}") for i, entry in entries)
    return next(filter(None, found), None)


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
