"""Spaces of environments in a checkpoint, for machines that cannot make the environments.

A policy is then exported, or plays elsewhere, without the package of its simulator.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch

from esper_lightning.core.errors import one_of
from esper_lightning.core.spaces import (
    ActionSpace,
    Box,
    Discrete,
    EnvSpaces,
    FactoredDiscrete,
    Head,
    MultiDiscrete,
)
from esper_lightning.envs.base import BatchedEnv, EnvSpec, spec_name
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.specs import StoredSpec, spec_from_data

__all__ = ["SPACES", "StoredEnv", "env_of_checkpoint", "spaces_from_data", "spaces_to_data"]

SPACES = "spaces"
"""Name of the spaces in the entry ``STATE_KEY`` of a checkpoint."""

_log = logging.getLogger(__name__)
_ACTIONS = {kind.__name__: kind for kind in (Box, Discrete, FactoredDiscrete, MultiDiscrete)}


class StoredEnv(EnvSpec, StoredSpec):
    """The spec of environments that cannot be made here, with what a checkpoint says of them.

    Args:
        data: Plain data of the original spec.
        num_envs: Number of environments of the original spec.
        spaces: Spaces of the original spec.
        why: The error for which the environments cannot be made.
    """

    def __init__(
        self, data: Mapping[str, Any], num_envs: int, spaces: EnvSpaces, why: Exception
    ) -> None:
        self.data, self.num_envs = dict(data), num_envs
        self._spaces, self._why = spaces, why
        task = cast(Mapping[str, Any], data["init_args"]).get("id")
        self.name = str(task or str(data["class_path"]).rpartition(".")[2])

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces, as stored in the checkpoint."""
        return self._spaces

    def build(self, device: torch.device, seed: int) -> BatchedEnv:  # noqa: ARG002
        """Raise the error for which the environments cannot be made.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{self.name} cannot be built here: {_line(self._why)}") from self._why

    def evaluation_spec(self, episodes: int) -> "StoredEnv":  # noqa: ARG002 - none can be built
        """The spec itself."""
        return self


def env_of_checkpoint(checkpoint: Mapping[str, Any]) -> EnvSpec:
    """The environment spec of a checkpoint; where its package is missing, a ``StoredEnv``.

    Args:
        checkpoint: A whole checkpoint of PPO.

    Raises:
        ValueError: If the spec cannot be built for another reason, or if a checkpoint of an earlier
            version holds no spaces.
    """
    data = checkpoint["hyper_parameters"]["env"]
    stored = checkpoint[STATE_KEY].get(SPACES)
    env: EnvSpec | None = None
    try:
        env = spec_from_data(data, owner="env", kind=EnvSpec)
        assert env is not None
        env.spaces()
        return env
    except Exception as error:  # a simulator may raise anything
        if stored is None or (env is None and not _is_missing(error)):
            raise
        spaces = spaces_from_data(stored)
        named = "the environment" if env is None else spec_name(env)
        message = "Without %s the policy is loaded alone, with the spaces of its checkpoint: %s"
        _log.warning(message, named, _line(error))
        return StoredEnv(data, int(stored["num_envs"]), spaces, error)


def spaces_to_data(spaces: EnvSpaces, num_envs: int) -> dict[str, Any]:
    """Spaces as plain data, with the number of environments.

    Args:
        spaces: Observation and action spaces.
        num_envs: Number of environments on each rank.
    """
    groups = spaces.obs if isinstance(spaces.obs, dict) else {"": spaces.obs}
    return {
        "num_envs": num_envs,
        "obs": {name: dataclasses.asdict(box) for name, box in groups.items()},
        "action": {"kind": type(spaces.action).__name__, **dataclasses.asdict(spaces.action)},
        "masked": spaces.masked,
    }


def spaces_from_data(data: Any) -> EnvSpaces:
    """Spaces rebuilt from what ``spaces_to_data`` returned.

    Raises:
        ValueError: If the data describe no spaces.
    """
    try:
        boxes = {str(name): Box(**_tuples(box)) for name, box in data["obs"].items()}
        action = _tuples(data["action"])
        return EnvSpaces(
            obs=boxes[""] if list(boxes) == [""] else boxes,
            action=_action(action.pop("kind"), action),
            masked=data["masked"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        rule = "describe the spaces of its environment"
        raise ValueError(f"The checkpoint's spaces must {rule}: {error!r}.") from error


def _action(kind: str, fields: dict[str, Any]) -> ActionSpace:
    one_of("The checkpoint's action space", kind, _ACTIONS)
    if "heads" in fields:
        fields["heads"] = tuple(Head(**_tuples(head)) for head in fields["heads"])
    return _ACTIONS[kind](**fields)


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {n: tuple(cast(Any, v)) if isinstance(v, list) else v for n, v in fields.items()}


def _is_missing(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is that of a package that is not installed."""
    while error is not None:
        if isinstance(error, ImportError):
            return True
        error = error.__cause__
    return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
