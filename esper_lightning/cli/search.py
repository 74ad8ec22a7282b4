"""The search space of ``esper sweep``: which settings are tried, and with which values.

``NAME=LOW..HIGH`` is a range, of integers where both ends are integers; ``NAME=LOW..HIGH log`` is
a range whose orders of magnitude are alike; ``NAME=[A, B, ...]`` is a list of choices.
"""
# Optuna and PyYAML give values of any type.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import re
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import yaml

from esper_lightning.core.errors import require

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["Dimension", "parse_dimension"]

_NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})( log)?")
_NAME = re.compile(r"(?:model|trainer)(?:\.\w+)+")
# Runs that differ in these are not variants of each other: ``esper compare`` refuses the first,
# and a longer run is no better setting.
_FIXED = re.compile(r"model\.(env|seed|total_env_steps)(\.|$)")
_FORM = "be NAME=LOW..HIGH, NAME=LOW..HIGH log, or NAME=[A, B, ...]"


class Dimension(NamedTuple):
    """One setting of a search.

    Attributes:
        name: Name of the setting, such as ``model.ppo.learning_rate``.
        low: Least value of a range; ``None`` for choices.
        high: Greatest value of a range; ``None`` for choices.
        is_log: Whether the orders of magnitude of a range are alike.
        choices: Values as they are given to ``esper fit``; empty for a range.
    """

    name: str
    low: float | None = None
    high: float | None = None
    is_log: bool = False
    choices: tuple[str, ...] = ()

    def distribution(self) -> "BaseDistribution":
        """The distribution by which Optuna knows the setting."""
        from optuna.distributions import (  # noqa: PLC0415 - takes a second
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.low is None or self.high is None:
            return CategoricalDistribution(self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.is_log)
        return FloatDistribution(self.low, self.high, log=self.is_log)


def parse_dimension(text: str) -> Dimension:
    """The setting and the values of one ``--search``.

    Raises:
        ValueError: If the text has another form, the range is empty, or the setting must be the
            same in all runs that are compared.
    """
    name, _, values = (part.strip() for part in text.partition("="))
    require(bool(_NAME.fullmatch(name)), "--search", _FORM, text, "A NAME: model.ppo.clip.")
    hint = "Runs that are compared have one environment and one budget."
    require(not _FIXED.match(name), "--search", "name a setting that may differ", name, hint)
    found = _RANGE.fullmatch(values)
    if found is not None:
        low, high = _number(found[1]), _number(found[2])
        require(low < high, f"--search {name}", "have a LOW below its HIGH", values)
        ok = low > 0 or not found[3]
        require(ok, f"--search {name}", "be positive where it is logarithmic", values)
        if not (isinstance(low, int) and isinstance(high, int)):
            low, high = float(low), float(high)
        return Dimension(name, low, high, is_log=bool(found[3]))
    try:
        # The base loader changes no text: "off" is a mode of compilation, and "1e-3" a number.
        content = yaml.load(values, yaml.BaseLoader) if values.startswith("[") else None
    except yaml.YAMLError:
        content = None
    require(isinstance(content, list), f"--search {name}", _FORM, values)
    choices = tuple(_spelled(value) for value in cast(list[Any], content))
    rule = "have two or more choices, each once"
    ok = len(choices) > 1 and len(set(choices)) == len(choices)
    require(ok, f"--search {name}", rule, values)
    return Dimension(name, choices=choices)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _spelled(value: Any) -> str:
    """A choice as an argument of ``esper fit``."""
    if isinstance(value, list):
        return f"[{', '.join(map(_spelled, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_spelled(each)}" for key, each in value.items()) + "}"
    return str(value)
