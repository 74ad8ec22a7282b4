"""What a checkpoint of PPO says about the run that wrote it, and which runs it may serve."""
# Checkpoints are read as they are, from whatever wrote them.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import hashlib
import math
import re
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from esper_lightning.core.errors import require
from esper_lightning.core.tensor_trees import named_tensors
from esper_lightning.envs.base import EnvSpec
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import refuse_unbounded
from esper_lightning.policies.base import PolicySpec
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.training.checkpoint.files import read_checkpoint
from esper_lightning.training.specs import spec_from_data

__all__ = [
    "STATE_KEY",
    "checkpoint_at",
    "digest",
    "load_checkpoint",
    "load_weights",
    "refuse_foreign",
    "refuse_huge",
    "refuse_non_finite",
    "refuse_not_ours",
    "refuse_not_whole",
    "refuse_other_optimizer",
    "refuse_other_weights",
    "settings_of",
]

STATE_KEY = "esper_lightning"
"""Where a checkpoint keeps what Lightning does not: counters, environments, random streams."""

_COUNT, _PLAIN = "a number of at least 0", "plain data"
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
        "train_time_s": _COUNT,
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
_MOST_NAMES = 4
_SMALL = 1_000_000  # numbers in a tensor that networks may always have


def load_checkpoint(path: str | Path, *, field: str = "ckpt_path") -> dict[str, Any]:
    """Read a checkpoint of PPO into memory of the CPU, tensors and plain data only.

    Args:
        path: Of the checkpoint.
        field: The setting that names it, for errors.

    Raises:
        ValueError: If there is none at ``path``, saying what there is.
    """
    is_path = isinstance(path, str | Path)  # pyright: ignore[reportUnnecessaryIsInstance]
    require(is_path, field, "be a path", path)
    try:
        checkpoint = read_checkpoint(path)
        refuse_not_ours(checkpoint, str(path))
        refuse_not_whole(checkpoint, str(path))
    except ValueError as error:
        said = str(error)
        if field == "ckpt_path" or not said.startswith("ckpt_path "):
            raise
        raise ValueError(field + said.removeprefix("ckpt_path")) from error
    return checkpoint


def checkpoint_at(path: str | Path) -> Path:
    """A checkpoint's own path, or the best one in a run directory, or the last one there.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    layout = RunLayout(path)
    found = [file for file in (layout.best_checkpoint, layout.last_checkpoint) if file.exists()]
    rule = "name a checkpoint, or a run directory with checkpoints/best.ckpt or last.ckpt"
    require(len(found) > 0, "ckpt_path", rule, str(path))
    return found[0]


def digest(checkpoint: Mapping[str, Any]) -> int:
    """A number of 48 bits, which a double holds, that tells training states apart.

    It is made of weights, optimizer states and counters, at about a gigabyte a second.
    """
    counters = checkpoint.get(STATE_KEY, {})
    counted = [counters.get(name) for name in ("iteration", "env_steps", "gradient_steps")]
    content = hashlib.blake2b(repr(counted).encode(), digest_size=6)
    parts = {name: checkpoint.get(name) for name in ("state_dict", "optimizer_states")}
    for name, value in named_tensors(parts):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        content.update(flat.view(torch.uint8).numpy().data)
    return int.from_bytes(content.digest())


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Weights and normalisers of a checkpoint into a PPO module, for a warm start.

    Raises:
        ValueError: If there is no checkpoint of PPO at ``path``, or it is of other networks or
            another normalisation, or not finite.
    """
    checkpoint = load_checkpoint(path, field="PPO.warm_start")
    refuse_other_weights(module, checkpoint, str(path), field="PPO.warm_start")
    refuse_non_finite(checkpoint, str(path), field="PPO.warm_start")
    module.load_state_dict(checkpoint["state_dict"])


def refuse_not_ours(checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint that another module wrote.

    Raises:
        ValueError: Naming ``path``.
    """
    require(STATE_KEY in checkpoint, "ckpt_path", "name a checkpoint of PPO", path)


def refuse_not_whole(checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint that lacks what those of PPO hold, or holds something else in its place.

    Raises:
        ValueError: Naming ``path`` and the first misfit.
    """
    _refuse_misfit(checkpoint, _OURS, path)
    version = checkpoint["pytorch-lightning_version"]
    rule = "be written by a version of Lightning"
    require(_VERSION.fullmatch(version) is not None, "ckpt_path", rule, path, f"Not {version!r}.")


def refuse_other_weights(
    module: nn.Module, checkpoint: Mapping[str, Any], path: str, *, field: str = "ckpt_path"
) -> None:
    """Refuse weights that are not those of a module: other names, shapes or kinds of numbers.

    Raises:
        ValueError: Naming ``path`` and the first of them.
    """
    own, given = module.state_dict(), cast(Mapping[str, Tensor], checkpoint["state_dict"])
    rule = "be of the same networks and normalisers"
    for name in sorted(own.keys() | given.keys(), key=str):
        if name not in given or name not in own:
            reason = f"It {'lacks' if name in own else 'has'} {name}."
        elif not _is_like(given[name], own[name]):
            one, other = (f"{list(t.shape)} of {t.dtype}" for t in (given[name], own[name]))
            reason = f"Its {name} is {one}, not {other}."
        else:
            continue
        require(False, field, rule, path, reason)


def refuse_non_finite(
    checkpoint: Mapping[str, Any], path: str, *, field: str = "ckpt_path", resuming: bool = False
) -> None:
    """Refuse weights that are not finite, and states of the optimizer where they are used.

    Raises:
        ValueError: Naming ``path`` and the first few of them.
    """
    trees = {"": checkpoint["state_dict"]}
    if resuming:
        trees["optimizer"] = [states["state"] for states in checkpoint["optimizer_states"]]
    tensors = (pair for name, tree in trees.items() for pair in named_tensors(tree, name))
    bad = [name for name, tensor in tensors if not bool(tensor.isfinite().all())]
    shown = ", ".join(bad[:_MOST_NAMES]) + (", ..." if len(bad) > _MOST_NAMES else "")
    hint = f"Not finite: {shown}."
    require(not bad, field, "hold finite weights", path, hint)


def refuse_other_optimizer(
    trained: Sequence[Tensor], checkpoint: Mapping[str, Any], path: str
) -> None:
    """Refuse a checkpoint from which training cannot be resumed.

    Args:
        trained: The parameters that the optimizer is over, in its order.
        checkpoint: Of PPO.
        path: Of the checkpoint, for the error.

    Raises:
        ValueError: Naming what is missing or does not fit.
    """
    _refuse_misfit(checkpoint, _TO_RESUME, path)
    ranks = checkpoint[STATE_KEY]["ranks"]
    for rank, state in ranks.items():
        _refuse_misfit(state, _RANK, path, f"{STATE_KEY}.ranks.{rank}")
    rule, states = "hold the state of one Adam over the policy", checkpoint["optimizer_states"]
    groups = [group["params"] for each in states for group in each["param_groups"]]
    require(groups == [list(range(len(trained)))], "ckpt_path", rule, path)
    group = states[0]["param_groups"][0]
    rate = _misfit(group.get("lr"), _COUNT, "lr")
    require(rate is None, "ckpt_path", rule, path, f"Its {rate}.")
    for number, state in states[0]["state"].items():
        known = isinstance(number, int) and 0 <= number < len(trained) and isinstance(state, dict)
        require(known, "ckpt_path", rule, path, f"It has a state of {number!r}.")
        moments = [state.get(name) for name in ("exp_avg", "exp_avg_sq")]
        like = [isinstance(m, Tensor) and _is_like(m, trained[number]) for m in moments]
        step = state.get("step")
        counted = isinstance(step, Tensor) and step.numel() == 1
        require(all(like) and counted, "ckpt_path", rule, path, f"State {number} is of another.")


@contextlib.contextmanager
def refuse_huge(checkpoint: Mapping[str, Any]) -> Generator[None]:
    """Within it, networks are built that may be no greater than the weights of a checkpoint.

    Raises:
        ValueError: If settings in it would take all memory.
    """
    given = cast(Mapping[str, Tensor], checkpoint["state_dict"]).values()
    with _Bounded(_SMALL + 2 * max((tensor.numel() for tensor in given), default=0)):
        yield


class _Bounded(TorchDispatchMode):
    """Refuses to allocate tensors of more numbers than these."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        size = args[0] if args else None
        if isinstance(size, list | tuple) and all(isinstance(n, int) for n in cast(Any, size)):
            rule, numbers = "describe the networks of its weights", math.prod(cast(Any, size))
            require(numbers <= self._most, "hyper_parameters", rule, f"{numbers:,} in a tensor")
        return func(*args, **(kwargs or {}))


def _is_like(given: Tensor, own: Tensor) -> bool:
    """Whether one can be copied to the other: same shape, same kind of number, dense."""
    dense = given.layout == torch.strided and given.device.type != "meta"
    kind = given.is_floating_point() == own.is_floating_point()
    same = given.dtype == own.dtype or given.is_floating_point()
    return given.shape == own.shape and dense and kind and same and not given.is_quantized


def _refuse_misfit(value: Any, shape: Any, path: str, name: str = "") -> None:
    misfit = _misfit(value, shape, name)
    rule = "hold a whole checkpoint of PPO"
    require(misfit is None, "ckpt_path", rule, path, f"{misfit}.")


def _misfit(value: Any, shape: Any, name: str) -> str | None:
    """The first place in which a value is not of a shape, in words; ``None`` if it is.

    A shape is a type (``int``: a count), a list or dictionary of shapes, or one of two words.
    """
    if isinstance(shape, dict):
        return _misfit_in_dictionary(value, cast(dict[str, Any], shape), name)
    if isinstance(shape, list):
        if not isinstance(value, list | tuple):
            return f"{name} is no list"
        entries = enumerate(cast(Sequence[Any], value))
        found = (_misfit(entry, shape[0], f"{name}.{i}") for i, entry in entries)
        return next(filter(None, found), None)
    if shape is _PLAIN:
        return _not_plain(value, name)
    if shape in (_COUNT, int):
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
        if found := _misfit(value[key], shape.get(key, shape.get("*", object)), inner):
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


def refuse_foreign(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], *, world_size: int | None
) -> None:
    """Refuse a checkpoint of another environment, policy, normalisation or number of ranks.

    Args:
        checkpoint: Of PPO.
        settings: ``PPO.settings`` of the run that is to use it.
        world_size: Number of ranks on which training is to go on; ``None`` for an evaluation, which
            may use another ``num_envs``.

    Raises:
        ValueError: Naming the first setting that differs.
    """
    resuming = world_size is not None
    hint = "Use the config of the run that wrote the checkpoint"
    hint += ", or take its weights alone: PPO(warm_start=PATH)." if resuming else "."
    for name in ("env", "policy"):
        mine, theirs = (_flat(side[name]) for side in (settings, checkpoint["hyper_parameters"]))
        for key in ("class_path", *sorted((mine.keys() | theirs.keys()) - {"class_path"})):
            if key == "num_envs" and not resuming:
                continue
            field = f"PPO.{name}" if key == "class_path" else f"PPO.{name}.{key}"
            rule = f"be the checkpoint's, {theirs.get(key)!r}"
            require(mine.get(key) == theirs.get(key), field, rule, mine.get(key), hint)
    for key in ("normalize_obs", "normalize_reward"):
        mine, theirs = (side["ppo"][key] for side in (settings, checkpoint["hyper_parameters"]))
        require(mine == theirs, f"PPOConfig.{key}", f"be the checkpoint's, {theirs}", mine, hint)
    if resuming:
        theirs, field = checkpoint[STATE_KEY]["world_size"], "Trainer.devices * Trainer.num_nodes"
        require(world_size == theirs, field, f"be the checkpoint's, {theirs}", world_size, hint)


def settings_of(checkpoint: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The specs that a checkpoint's run was made of, as arguments of ``PPO``, unless ``given``.

    Raises:
        ValueError: If one cannot be made anew.
    """
    saved = checkpoint["hyper_parameters"]
    specs = {
        name: spec_from_data(saved[name], owner=name, kind=kind)
        for name, kind in (("env", EnvSpec), ("policy", PolicySpec))
        if name not in given
    }
    try:
        return {"ppo": PPOConfig(**saved["ppo"]), **specs, **given}
    except TypeError as error:
        raise ValueError(f"ckpt_path must hold settings of PPO: {error}.") from error


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": description["class_path"], **description["init_args"]}
