"""A figure of an episode of ``Morphogenesis``: the course of a host, and the agent's actions.

Axes: ``T`` epoch, ``S`` slot.
"""
# matplotlib's annotations are partial.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS
from esper_lightning.envs.morphogenesis.lifecycle import Op, Stage
from esper_lightning.forensics.files import replacing
from esper_lightning.forensics.pictures import PALETTE, PICTURE_METADATA
from esper_lightning.growth.play import Played

__all__ = ["draw"]

_STAGES = {
    Stage.TRAINING: "#F5E6A8",
    Stage.BLENDING: "#BFDDF2",
    Stage.HOLDING: "#D9C8EA",
    Stage.FOSSILIZED: "#BFE3CF",
    Stage.FADING: "#F3C6B8",
    Stage.EMBARGOED: "#DDDDDD",
}
_Axis = NDArray[Any]


def draw(played: Played, host: int, spec: Morphogenesis, path: Path, *, title: str) -> None:
    """Write a PNG of three panels over the epochs: accuracy and loss, slots, actions.

    Args:
        played: Episodes of a policy or baseline.
        host: Number of the host whose episode is drawn.
        spec: Settings of the environment in which the episodes were played.
        path: File to write.
        title: Text with which the title of the figure begins.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full.
    """
    slots, length = len(spec.channels), int(played.episode_length[host])
    course = {name: value[:length, host].numpy() for name, value in played.course._asdict().items()}
    epoch = np.arange(1, length + 1)
    height = 5.2 + 0.55 * slots
    figure = Figure(figsize=(8.0, height), dpi=130, layout="constrained")
    ratios = [2.4, 0.75 * slots, 1.7]
    fate, growth, actions = figure.subplots(3, 1, sharex=True, height_ratios=ratios)
    end = "when it diverged" if bool(played.diverged[host]) else "at the end"
    test, size = float(played.test_accuracy[host]), int(played.grown_parameters[host])
    figure.suptitle(
        f"{title}: return {float(played.episode_return[host]):.3g}\n"
        f"{end}, test accuracy {100 * test:.1f} %, {size:,} grown parameters",
        fontsize=11,
    )
    _fate(fate, epoch, course["accuracy"], course["loss"])
    _slots(growth, epoch, course)
    _actions(actions, epoch, course["action"], spec)
    actions.set_xlim(0.4, length + 0.6)
    actions.xaxis.set_major_locator(MaxNLocator(integer=True))
    actions.set_xlabel("epoch of the host")
    figure.align_ylabels()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata=PICTURE_METADATA)


def _fate(axes: Axes, epoch: _Axis, accuracy: _Axis, loss: _Axis) -> None:
    axes.plot(epoch, 100 * accuracy, "-o", color="0.15", ms=3)
    axes.set_ylabel("validation\naccuracy, %")
    axes.grid(alpha=0.25)
    right = axes.twinx()
    right.plot(epoch, loss, "--", color="#A33", lw=1.2)
    right.set_ylabel("loss (dashed)", color="#A33")
    right.tick_params(axis="y", colors="#A33")
    right.set_ylim(bottom=0)
    for one in (axes, right):
        one.spines["top"].set_visible(False)


def _slots(axes: Axes, epoch: _Axis, course: dict[str, _Axis]) -> None:
    """Draw a lane for each slot, 0 to 1 high, in the colours of its stages; alpha is a line."""
    count = course["stage"].shape[1]
    for s in range(count):
        floor = 1.2 * (count - 1 - s)
        stage, blueprint = course["stage"][:, s], course["blueprint"][:, s]
        for kind, colour in _STAGES.items():
            spans = [(t - 0.5, 1.0) for t in epoch[stage == kind]]
            axes.broken_barh(spans, (floor, 1.0), color=colour, lw=0, antialiased=False)
        begins = (stage == Stage.TRAINING) & (np.roll(stage, 1) != Stage.TRAINING)
        begins[0] = stage[0] == Stage.TRAINING
        for t in epoch[begins]:
            name = BLUEPRINTS[int(blueprint[t - 1])]
            axes.text(t - 0.45, floor + 0.95, name, fontsize=7, va="top", color="0.25")
        axes.plot(epoch, floor + course["alpha"][:, s], "-", color=PALETTE[s % len(PALETTE)], lw=2)
    axes.set_yticks([1.2 * (count - 1 - s) + 0.5 for s in range(count)])
    axes.set_yticklabels([f"slot {s}" for s in range(count)])
    axes.set_ylim(-0.1, 1.2 * count - 0.1)
    axes.set_ylabel("alpha, 0 to 1")
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=colour, label=kind.name.lower()) for kind, colour in _STAGES.items()]
    axes.legend(
        handles=patches,
        fontsize=7,
        ncols=len(patches),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        frameon=False,
        borderaxespad=0.1,
        columnspacing=1.2,
        handlelength=1.2,
    )


def _actions(axes: Axes, epoch: _Axis, action: _Axis, spec: Morphogenesis) -> None:
    """Draw a row for each op, with marks in the colour and with the number of the slot."""
    for t, (op, slot, _, ramp) in zip(epoch, action, strict=True):
        row = len(Op) - 1 - op
        if op == Op.WAIT:
            axes.plot(t, row, ".", color="0.7", ms=4)
            continue
        axes.plot(t, row, "o", color=PALETTE[slot % len(PALETTE)], ms=11)
        axes.text(t, row, str(slot), color="white", fontsize=7, ha="center", va="center_baseline")
        if op == Op.BLEND:
            axes.annotate(
                f"over {spec.ramp_epochs[ramp]}",
                (t, row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color="0.25",
            )
    axes.set_yticks(range(len(Op)))
    axes.set_yticklabels([op.name.lower() for op in reversed(Op)])
    axes.set_ylim(-0.6, len(Op) - 0.4)
    axes.set_ylabel("action")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
