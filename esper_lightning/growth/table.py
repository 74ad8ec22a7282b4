"""The table of ``esper evaluate`` for ``Morphogenesis``: a policy beside the baselines.

Axes: ``R`` trained policy, ``N`` host.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from esper_lightning.comparison.section import Section, number
from esper_lightning.core.errors import require
from esper_lightning.core.paths import require_output, requires_folder
from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.forensics.pictures import PICTURE_BEGINS
from esper_lightning.growth.play import Played, fresh_hosts, play_baselines, play_trained
from esper_lightning.training.module import PPO

__all__ = ["compare_policies", "refuse_figures", "table"]

_EPISODES = ("worst", "median", "best")  # episodes of the trained policy, by return
_HINT = "pip install 'esper_lightning[compare]'"


def refuse_figures(folder: Path) -> None:
    """Refuse ``--figures`` if figures cannot be drawn; make the folder if they can.

    Raises:
        ValueError: If matplotlib is missing, the folder cannot be made, or a file with the name of
            a figure is not a figure of this package.
    """
    drawn = importlib.util.find_spec("matplotlib") is not None
    require(drawn, "--figures", "find matplotlib", "none", f"{_HINT}.")
    with requires_folder("--figures", folder):
        folder.mkdir(parents=True, exist_ok=True)
    for episode in _EPISODES:
        _figure_file(folder, episode)


def _figure_file(folder: Path, episode: str) -> Path:
    path = folder / f"episode_{episode}.png"
    return require_output("--figures", path, "figure of esper", PICTURE_BEGINS)


def compare_policies(model: PPO, device: torch.device, *, figures: Path | None) -> str:
    """Play the trained policy and every baseline on the same fresh hosts.

    Args:
        model: Model with trained weights.
        device: Device on which hosts are trained.
        figures: Folder for figures of the trained policy's worst, median and best episode; ``None``
            for no figures.

    Returns:
        The table as text, followed by the paths of the figures.
    """
    hosts = model.settings.eval_episodes
    with fresh_hosts(model.env, hosts=hosts, device=device, seed=model.seed) as env:
        played = dict([*play_trained(model, env), *play_baselines(env)])
        host_parameters = env.host_parameters
    plural = {name: [one] for name, one in played.items()}
    lines = table(plural, host_parameters=host_parameters).plain()
    if figures is not None:
        from esper_lightning.growth.figure import draw  # noqa: PLC0415

        assert isinstance(model.env, Morphogenesis)
        order = cast(list[int], played["PPO"].episode_return.argsort().tolist())
        hosts_shown = (order[0], order[len(order) // 2], order[-1])
        for name, host in zip(_EPISODES, hosts_shown, strict=True):
            path = _figure_file(figures, name)
            draw(played["PPO"], host, model.env, path, title=f"PPO, {name} of {len(order)} hosts")
            lines.append(f"Figure: {path}")
    return "\n".join(lines)


def table(played: Mapping[str, Sequence[Played]], *, host_parameters: int) -> Section:
    """Table of return, test accuracy and size for each policy and baseline.

    Hosts of a population differ, and the best and the worst of them count like all others: their
    scores are plain means, with intervals.

    Args:
        played: Episodes by the name of the policy: an entry for each trained policy of that name,
            all on the same hosts.
        host_parameters: Number of parameters of a host on which nothing has grown.
    """
    estimates = importlib.util.find_spec("scipy") is not None
    differ = next(iter(played.values()))[0].kinds is not None
    statistic = "IQM" if estimates and not differ else "mean"
    between = ["95 % interval"] if estimates else []
    head = ["policy", "return", *between, "test accuracy, %", *between]
    head += ["grown parameters", *between, "of the host's, %", "diverged"]
    rows: list[list[str]] = []
    for name, plays in played.items():
        returns, accuracy, grown, share = (
            _cells(score, estimates, differ)
            for score in (
                [one.episode_return for one in plays],
                [100 * one.test_accuracy for one in plays],
                [one.grown_parameters for one in plays],
                [100 * one.grown_parameters / host_parameters for one in plays],
            )
        )
        diverged = torch.stack([one.diverged for one in plays])
        many = f"{int(diverged.sum())} of {diverged.numel()}"
        rows.append([name, *returns, *accuracy, *grown, share[0], many])
    hosts = len(next(iter(played.values()))[0].episode_return)
    title = f"{statistic} over the same {hosts} fresh hosts of {host_parameters:,} parameters"
    remarks = [] if estimates else [f"Plain means: {_HINT} for robust ones with intervals."]
    if estimates and hosts < 2:
        remarks.append("One host: there is no interval.")
    return Section(title, head, rows, remarks)


def _cells(score: Sequence[Tensor], estimates: bool, differ: bool) -> list[str]:
    """Cells of a score: its mean; with ``estimates``, its interquartile mean and the interval.

    Of hosts that ``differ``, no quarter is dropped.
    """
    scores = np.stack([one.double().numpy() for one in score])  # [R, N]
    if not estimates:
        return [number(scores.mean())]
    from esper_lightning.comparison import statistics  # noqa: PLC0415

    statistic = statistics.mean if differ else statistics.interquartile_mean
    value, low, high = statistics.estimate_crossed(scores, statistic)
    return [number(value), "-" if low is None else f"{number(low)} to {number(high)}"]
