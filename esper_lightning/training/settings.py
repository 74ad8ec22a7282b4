"""The settings of a PPO module: checked at construction, written as plain data, and read again.

Nothing here needs a Trainer, a device or a network. Settings that depend on the Trainer are checked
by ``trainer_rules``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from esper_lightning.compiling.loops import CompileMode
from esper_lightning.core.errors import at_least, check_fields, require
from esper_lightning.envs.base import EnvSpec, spec_name
from esper_lightning.envs.contract import Problems
from esper_lightning.envs.inspector import check_declared
from esper_lightning.policies import MLP
from esper_lightning.policies.base import PolicySpec
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.extension import ExtensionSpec
from esper_lightning.training.specs import require_specs, spec_from_data, spec_to_data, to_data

__all__ = ["PPOSettings"]


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """The arguments of ``PPO``, whose docstring explains each of them.

    Errors name ``PPO``, the class to which a user passes the settings.
    """

    env: EnvSpec
    policy: PolicySpec = MLP()  # noqa: RUF009 - frozen
    ppo: PPOConfig = PPOConfig()  # noqa: RUF009 - frozen
    seed: int = 0
    total_env_steps: int | None = None
    iterations_per_epoch: int = 50
    eval_episodes: int | None = None
    compile: CompileMode = "auto"
    warm_start: str | None = None
    extensions: tuple[ExtensionSpec, ...] = ()
    redeal: bool = False

    def __post_init__(self) -> None:
        check_fields(self, owner="PPO")
        require_specs("PPO", self.env, self.policy)
        for extension in self.extensions:
            hint = "RND(), for example."
            is_spec = isinstance(extension, ExtensionSpec)  # pyright: ignore[reportUnnecessaryIsInstance]
            require(is_spec, "PPO.extensions", "be extension specs", extension, hint)
        twice = [each for i, each in enumerate(self.extensions) if each in self.extensions[:i]]
        require(not twice, "PPO.extensions", "differ from each other", twice)
        single = [type(each) for each in self.extensions if not each.several]
        twice = [kind.__name__ for i, kind in enumerate(single) if kind in single[:i]]
        hint = "The names of their metrics and terms would be the same: see ExtensionSpec.several."
        require(not twice, "PPO.extensions", "be of different classes", twice, hint)
        problems = Problems(spec_name(self.env))
        with problems.raise_at_end():
            check_declared(self.env.num_envs, self.env.spaces(), problems)
        for name in ("iterations_per_epoch", "eval_episodes"):
            at_least(f"PPO.{name}", getattr(self, name), 1)
        budget, least = self.total_env_steps, self.env.num_envs
        rule = f"be at least env.num_envs = {least}"
        require(budget is None or budget >= least, "PPO.total_env_steps", rule, budget)

    def arguments(self) -> dict[str, Any]:
        """Every setting by its name, as keyword arguments of ``PPO``."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def names(cls) -> list[str]:
        """Names of all settings, in their order."""
        return [field.name for field in dataclasses.fields(cls)]

    def to_data(self) -> dict[str, Any]:
        """Plain data in the form of a config's ``model``, for checkpoints and ``config.yaml``."""
        specs = {"env": spec_to_data(self.env), "policy": spec_to_data(self.policy)}
        return {name: specs.get(name) or to_data(value) for name, value in self.arguments().items()}

    @classmethod
    def from_data(cls, data: Mapping[str, Any], **given: Any) -> Self:
        """Settings rebuilt from the plain data that ``to_data`` returned.

        Args:
            data: Plain data, of a checkpoint for example. Names that are not settings are ignored.
            **given: Settings that replace those in ``data``. A spec that is replaced is not built.

        Raises:
            ValueError: If a spec cannot be built, or a setting is out of range.
        """
        names = cls.names()
        settings = {name: value for name, value in {**data, **given}.items() if name in names}
        for name, kind in (("env", EnvSpec), ("policy", PolicySpec)):
            if name not in given:
                settings[name] = spec_from_data(data[name], owner=name, kind=kind)
        if "extensions" not in given:  # checkpoints of earlier versions have none
            settings["extensions"] = tuple(
                spec_from_data(each, owner="extensions", kind=ExtensionSpec)
                for each in data.get("extensions", ())
            )
        if "ppo" not in given:
            try:
                settings["ppo"] = PPOConfig(**data["ppo"])
            except TypeError as error:
                raise ValueError(f"ckpt_path must hold settings of PPO: {error}.") from error
        return cls(**settings)
