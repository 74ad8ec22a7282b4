"""What a checkpoint of PPO says about the run that wrote it, and which runs it may serve."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper_lightning.core.tensor_trees import named_tensors
from esper_lightning.core.validate import require
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.checkpoint_io import read_checkpoint
from esper_lightning.training.config import PPOConfig
from esper_lightning.training.specs import instantiate

__all__ = [
    "STATE_KEY",
    "checkpoint_at",
    "digest",
    "load_checkpoint",
    "load_weights",
    "refuse_foreign",
    "refuse_not_ours",
    "settings_of",
]

STATE_KEY = "esper_lightning"
"""Where a checkpoint keeps what Lightning does not: counters, environments, random streams."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of PPO into memory of the CPU, tensors and plain data only.

    Raises:
        ValueError: If there is none at ``path``, saying what there is.
    """
    checkpoint = read_checkpoint(path)
    refuse_not_ours(checkpoint, str(path))
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
            another normalisation.
    """
    try:
        module.load_state_dict(load_checkpoint(path)["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        rule = "be of the same networks and normalisers"
        raise ValueError(f"PPO.warm_start must {rule}, got {str(path)!r}. {reason}") from error


def refuse_not_ours(checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint that another module wrote.

    Raises:
        ValueError: Naming ``path``.
    """
    require(STATE_KEY in checkpoint, "ckpt_path", "name a checkpoint of PPO", path)


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
        name: instantiate(saved[name], owner=name)
        for name in ("env", "policy")
        if name not in given
    }
    return {"ppo": PPOConfig(**saved["ppo"]), **specs, **given}


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": description["class_path"], **description["init_args"]}
