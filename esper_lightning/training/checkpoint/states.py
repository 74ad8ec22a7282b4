"""Reading checkpoints of PPO, and refusing those that do not fit a run."""
# The types of a checkpoint's content are not known: any program may have written the file.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import hashlib
import logging
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from esper_lightning.core.errors import require, require_local
from esper_lightning.core.flat_adam import PLAIN_ADAM
from esper_lightning.core.paths import expand_home
from esper_lightning.core.tensor_trees import named_tensors
from esper_lightning.envs.base import how_fields
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.checkpoint.content import (
    COUNT,
    STATE_KEY,
    find_misfit,
    is_extra,
    refuse_not_ours,
    refuse_not_resumable,
    refuse_not_whole,
)
from esper_lightning.training.checkpoint.files import read_checkpoint
from esper_lightning.training.checkpoint.redeal import is_dealt, refuse_deal
from esper_lightning.training.settings import PPOSettings
from esper_lightning.training.specs import with_defaults

__all__ = [
    "STATE_KEY",
    "checkpoint_at",
    "digest",
    "keep_own_extensions",
    "load_checkpoint",
    "load_weights",
    "refuse_checkpoint",
    "refuse_foreign",
    "refuse_huge",
    "refuse_non_finite",
    "refuse_other_optimizer",
    "refuse_other_weights",
]

_log = logging.getLogger(__name__)
_MOST_NAMES = 4
_SMALL = 1_000_000  # a network may always have a tensor of so many numbers


def load_checkpoint(path: str | Path, *, field: str = "ckpt_path") -> dict[str, Any]:
    """Read a checkpoint of PPO into the memory of the CPU; only tensors and plain data are read.

    Args:
        path: Path of the checkpoint.
        field: Setting that names the path, for errors.

    Raises:
        ValueError: If there is no whole checkpoint of PPO at ``path``. The error says what is
            there.
    """
    is_path = isinstance(path, str | Path)  # pyright: ignore[reportUnnecessaryIsInstance]
    require(is_path, field, "be a path", path)
    require_local(field, path, "a checkpoint")
    try:
        checkpoint = read_checkpoint(expand_home(path))
        refuse_not_ours(checkpoint, str(path))
        refuse_not_whole(checkpoint, str(path))
    except ValueError as error:
        said = str(error)
        if field == "ckpt_path" or not said.startswith("ckpt_path "):
            raise
        raise ValueError(field + said.removeprefix("ckpt_path")) from error
    return checkpoint


def checkpoint_at(path: str | Path) -> Path:
    """The path of a checkpoint; for a run directory, its best checkpoint or else its last one.

    Args:
        path: Path of a checkpoint or of a run directory.

    Raises:
        ValueError: If a run directory holds neither.
    """
    rule = "name a checkpoint, or a run directory with checkpoints/best.ckpt or last.ckpt"
    require(str(path) != "", "ckpt_path", rule, path)
    require_local("ckpt_path", path, "a checkpoint or a run directory")
    path = expand_home(path)
    if not path.is_dir():
        return path
    layout = RunLayout(path)
    found = [file for file in (layout.best_checkpoint, layout.last_checkpoint) if file.exists()]
    require(len(found) > 0, "ckpt_path", rule, str(path))
    return found[0]


def digest(checkpoint: Mapping[str, Any]) -> int:
    """A hash of a training state: of weights, optimizer states and counters.

    The hash has 48 bits, so that a double can hold it. It takes about a second for each gigabyte.

    Args:
        checkpoint: A checkpoint of PPO, or some of its entries.
    """
    counters = checkpoint.get(STATE_KEY, {})
    counted = [counters.get(name) for name in ("iteration", "env_steps", "gradient_steps")]
    content = hashlib.blake2b(repr(counted).encode(), digest_size=6)
    trees = {name: checkpoint.get(name) for name in ("state_dict", "optimizer_states")}
    for name, value in named_tensors(trees):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        content.update(flat.view(torch.uint8).numpy().data)
    return int.from_bytes(content.digest())


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load weights and normalisers of a checkpoint into a PPO module, for a warm start.

    Args:
        module: PPO module whose weights are replaced.
        path: Path of the checkpoint.

    Raises:
        ValueError: If there is no checkpoint of PPO at ``path``, if it is of other networks or
            another normalisation, or if its weights are not finite.
    """
    checkpoint = load_checkpoint(path, field="PPO.warm_start")
    if keep_own_extensions(checkpoint, module):
        _log.warning(
            "PPO.warm_start: %s is of other PPO.extensions, whose state is not used.", path
        )
    refuse_other_weights(module, checkpoint, str(path), field="PPO.warm_start")
    refuse_non_finite(checkpoint, str(path), field="PPO.warm_start")
    module.load_state_dict(checkpoint["state_dict"])


def keep_own_extensions(checkpoint: dict[str, Any], module: nn.Module) -> bool:
    """Give a checkpoint of other extensions the weights that a module's own extensions have.

    Only training that is resumed needs the extensions of the checkpoint.

    Args:
        checkpoint: Content of a checkpoint, whose ``state_dict`` is changed.
        module: Module that will load the checkpoint.

    Returns:
        Whether the checkpoint loses the state of an extension by that.
    """
    theirs, own = (
        {name: value for name, value in state.items() if name.startswith("extensions.")}
        for state in (checkpoint["state_dict"], module.state_dict())
    )
    weights = [name for name in own if not is_extra(name)]
    alike = theirs.keys() == own.keys() and all(_is_like(theirs[k], own[k]) for k in weights)
    if not alike:
        given = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {k: v for k, v in given if k not in theirs} | own
    return not alike and len(theirs) > 0


def refuse_checkpoint(
    checkpoint: dict[str, Any],
    path: str,
    *,
    module: nn.Module,
    settings: PPOSettings,
    trained: Sequence[Tensor],
    world_size: int | None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Refuse a checkpoint that a module cannot use: of other settings, or not finite.

    Args:
        checkpoint: A checkpoint of PPO.
        path: Path of the checkpoint, for the error.
        module: The PPO module that is to use it.
        settings: Settings of the module.
        trained: Parameters that the optimizer trains, in its order.
        world_size: Number of ranks that resume training; ``None`` for an evaluation.
        callbacks: Callbacks that will load their states when training is resumed.

    Raises:
        ValueError: If the checkpoint does not fit. The error names what does not fit.
    """
    refuse_not_whole(checkpoint, path)
    refuse_foreign(checkpoint, settings, world_size=world_size)
    if world_size is None:
        keep_own_extensions(checkpoint, module)
    refuse_other_weights(module, checkpoint, path)
    if world_size is not None:
        refuse_not_resumable(checkpoint, path, callbacks=callbacks)
        if is_dealt(checkpoint, settings, world_size=world_size):
            refuse_deal(checkpoint, settings, world_size=world_size)
        refuse_other_optimizer(trained, checkpoint, path)
    refuse_non_finite(checkpoint, path, resuming=world_size is not None)


def refuse_foreign(
    checkpoint: Mapping[str, Any], settings: PPOSettings, *, world_size: int | None
) -> None:
    """Refuse a checkpoint of another environment, policy, normalisation or number of ranks.

    Args:
        checkpoint: A checkpoint of PPO.
        settings: Settings of the run that is to use it.
        world_size: Number of ranks that resume training; ``None`` for an evaluation, which may use
            another ``num_envs``.

    Raises:
        ValueError: If a setting differs. The error names the first such setting.
    """
    resuming, own = world_size is not None, settings.to_data()
    deals = is_dealt(checkpoint, settings, world_size=world_size)
    hint = "Use the config of the run that wrote the checkpoint"
    hint += ", or take its weights alone: PPO(warm_start=PATH)." if resuming else "."
    how = how_fields(settings.env)
    for name in ("env", "policy"):
        stored = with_defaults(checkpoint["hyper_parameters"][name], getattr(settings, name))
        mine, theirs = _flat(own[name]), _flat(stored)
        for key in ("class_path", *sorted((mine.keys() | theirs.keys()) - {"class_path"})):
            if key in how or (key == "num_envs" and (deals or not resuming)):
                continue
            field = f"PPO.{name}" if key == "class_path" else f"PPO.{name}.{key}"
            rule = f"be the checkpoint's, {theirs.get(key)!r}"
            skipped = how if resuming and not deals else how | {"num_envs"}
            same = _without(mine.get(key), skipped) == _without(theirs.get(key), skipped)
            require(same, field, rule, mine.get(key), hint)
    for key in ("normalize_obs", "normalize_reward"):
        mine, theirs = (side["ppo"][key] for side in (own, checkpoint["hyper_parameters"]))
        require(mine == theirs, f"PPOConfig.{key}", f"be the checkpoint's, {theirs}", mine, hint)
    if resuming:
        mine = own["extensions"]
        theirs = checkpoint["hyper_parameters"].get("extensions", [])
        require(mine == theirs, "PPO.extensions", f"be the checkpoint's, {theirs}", mine, hint)
        theirs, field = checkpoint[STATE_KEY]["world_size"], "Trainer.devices * Trainer.num_nodes"
        rule = f"be {theirs} (or set PPO.redeal)"
        require(world_size == theirs or deals, field, rule, world_size, hint)


def refuse_other_weights(
    module: nn.Module, checkpoint: Mapping[str, Any], path: str, *, field: str = "ckpt_path"
) -> None:
    """Refuse weights that do not fit a module: other names, shapes or kinds of numbers.

    Args:
        module: PPO module that is to use the checkpoint.
        checkpoint: A checkpoint of PPO.
        path: Path of the checkpoint, for the error.
        field: Setting that names the path, for the error.

    Raises:
        ValueError: If weights do not fit. The error names ``path`` and the first such weight.
    """
    own, given = module.state_dict(), cast(Mapping[str, Tensor], checkpoint["state_dict"])
    rule = "be of the same networks and normalisers"
    for name in sorted(own.keys() | given.keys(), key=str):
        if name not in given or name not in own:
            reason = f"It {'lacks' if name in own else 'has'} {name}."
        elif not is_extra(name) and not _is_like(given[name], own[name]):
            one, other = (f"{list(t.shape)} of {t.dtype}" for t in (given[name], own[name]))
            reason = f"Its {name} is {one}, not {other}."
        else:
            continue
        require(False, field, rule, path, reason)


def refuse_non_finite(
    checkpoint: Mapping[str, Any], path: str, *, field: str = "ckpt_path", resuming: bool = False
) -> None:
    """Refuse weights that are not finite and, where a run is resumed, such optimizer states.

    Args:
        checkpoint: A checkpoint of PPO.
        path: Path of the checkpoint, for the error.
        field: Setting that names the path, for the error.
        resuming: Whether a run is resumed, so that optimizer states are used.

    Raises:
        ValueError: If a tensor is not finite. The error names ``path`` and the first few such
            tensors.
    """
    weights = checkpoint["state_dict"].items()
    trees: dict[str, Any] = {"": {name: value for name, value in weights if not is_extra(name)}}
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
        trained: Parameters that the optimizer trains, in its order.
        checkpoint: A checkpoint of PPO, whose entries are whole.
        path: Path of the checkpoint, for the error.

    Raises:
        ValueError: If a state is missing or does not fit. The error names the state.
    """
    rule, states = "hold the state of one Adam over the policy", checkpoint["optimizer_states"]
    groups = [group["params"] for each in states for group in each["param_groups"]]
    require(groups == [list(range(len(trained)))], "ckpt_path", rule, path)
    group = states[0]["param_groups"][0]
    rate = find_misfit(group.get("lr"), COUNT, "lr")
    require(rate is None, "ckpt_path", rule, path, f"Its {rate}.")
    got = {name: group.get(name) for name in PLAIN_ADAM}
    require(str(got) == str(PLAIN_ADAM), "ckpt_path", rule, path, f"It has {str(got)[:100]}.")
    for number, state in states[0]["state"].items():
        known = isinstance(number, int) and 0 <= number < len(trained) and isinstance(state, dict)
        require(known, "ckpt_path", rule, path, f"It has a state of {number!r}.")
        moments = [state.get(name) for name in ("exp_avg", "exp_avg_sq")]
        like = [isinstance(m, Tensor) and _is_like(m, trained[number]) for m in moments]
        step = state.get("step")
        counted = isinstance(step, Tensor) and step.numel() == 1
        require(all(like) and counted, "ckpt_path", rule, path, f"State {number} fits no weight.")


@contextlib.contextmanager
def refuse_huge(checkpoint: Mapping[str, Any]) -> Generator[None]:
    """A context in which no network can be built that is much larger than a checkpoint's weights.

    Args:
        checkpoint: A checkpoint of PPO whose settings describe the network.

    Raises:
        ValueError: If the settings describe a larger network, which could take all memory.
    """
    given = (tensor.numel() for _, tensor in named_tensors(checkpoint["state_dict"]))
    with _Bounded(_SMALL + 2 * max(given, default=0)):
        yield


class _Bounded(TorchDispatchMode):
    """A mode of torch that refuses to allocate tensors of more than ``most`` numbers."""

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
    """Whether a tensor can be copied to another: same shape, same kind of number, dense."""
    dense = given.layout == torch.strided and given.device.type != "meta"
    kind = given.is_floating_point() == own.is_floating_point()
    same = given.dtype == own.dtype or given.is_floating_point()
    return given.shape == own.shape and dense and kind and same and not given.is_quantized


def _without(value: Any, fields: frozenset[str]) -> Any:
    """Plain data of a setting; where it is a spec within a spec, without some of its fields."""
    if not isinstance(value, dict):
        return value
    known = cast(dict[str, Any], value).items()
    return {key: _without(item, fields) for key, item in known if key not in fields}


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": description["class_path"], **description["init_args"]}
