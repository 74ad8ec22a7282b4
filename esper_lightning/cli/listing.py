"""``esper list``: the configs, environments, policies and extensions that a setting may name."""

import inspect
import re
from types import ModuleType
from typing import Any

from esper_lightning.cli import shipped
from esper_lightning.cli.errors import CommandParser

__all__ = ["run"]

_LONGEST = 100  # characters of a description


def run(arguments: list[str]) -> None:
    """Print what can be named, a line each."""
    CommandParser("esper list", "What settings may name.").parse_args(arguments)
    # These imports need torch, which takes seconds.
    from esper_lightning import envs, policies, ppo  # noqa: PLC0415
    from esper_lightning.envs import EnvSpec  # noqa: PLC0415
    from esper_lightning.policies import PolicySpec  # noqa: PLC0415
    from esper_lightning.ppo import ExtensionSpec  # noqa: PLC0415

    groups = {
        "Configs: esper fit --config NAME": _configs(),
        "Environments: --model.env NAME": _classes(envs, EnvSpec),
        "Policies: --model.policy NAME": _classes(policies, PolicySpec),
        "Extensions of PPO: --model.extensions NAME": _classes(ppo, ExtensionSpec),
    }
    for title, entries in groups.items():
        print(f"{title}\n")
        width = max(map(len, entries)) + 2
        print("\n".join(f"  {name:<{width}}{text}" for name, text in entries.items()), end="\n\n")
    print("A class of your own is named by its path: --model.env my_module.MyEnv")


def _configs() -> dict[str, str]:
    """The first sentence of the comment at the top of each shipped config."""
    described: dict[str, str] = {}
    for name in shipped.names():
        lines = (shipped.FOLDER / f"{name}.yaml").read_text("utf-8").splitlines()
        comment = [line[2:] for line in lines[: _comment_lines(lines)]]
        described[name] = _first_sentence(" ".join(comment))
    return described


def _comment_lines(lines: list[str]) -> int:
    return next((k for k, line in enumerate(lines) if not line.startswith("# ")), len(lines))


def _classes(module: ModuleType, base: type) -> dict[str, str]:
    """Exported classes that are specs, with the first sentence of each docstring."""
    members: list[tuple[str, Any]] = [(name, getattr(module, name)) for name in module.__all__]
    return {
        name: _first_sentence(inspect.getdoc(member) or "")
        for name, member in members
        if inspect.isclass(member) and issubclass(member, base) and not inspect.isabstract(member)
    }


def _first_sentence(text: str) -> str:
    text = " ".join(text.split("\n\n", maxsplit=1)[0].replace("``", "").split())
    sentence = re.split(r"(?<=(?<! al)\.) |: esper ", text)[0]
    return sentence if len(sentence) <= _LONGEST else f"{sentence[: _LONGEST - 3]}..."
