"""Observations and action masks: what the agent sees of its host, and its legal choices.

Axes: ``B`` environment, ``S`` slot, ``O`` feature. Features are scaled to about 1 and always
finite.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.core.spaces import FactoredDiscrete, Head
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS
from esper_lightning.envs.morphogenesis.lifecycle import LIVE, Op, Slots, Stage, is_in

__all__ = ["HISTORY", "Vitals", "action_mask", "action_space", "feature_names", "observe"]

HISTORY = 5
_CONTRIBUTION_SCALE = 10.0
_MAX_LOSS = 5.0  # times the loss of a guess


class Vitals(NamedTuple):
    """Measurements and history of each host, without its slots."""

    step: Int[Tensor, " B"]
    losses: Float[Tensor, "B 5"]  # of the validation split, newest first
    accuracies: Float[Tensor, "B 5"]
    contribution: Float[Tensor, "B S"]
    contribution_age: Int[Tensor, "B S"]  # epochs since the contribution was measured
    germination_accuracy: Float[Tensor, "B S"]
    grad_norm: Float[Tensor, "B S"]
    last_op: Int[Tensor, " B"]
    last_slot: Int[Tensor, " B"]
    changed: Bool[Tensor, " B"]  # whether the last action changed a slot


def action_space(slots: int, blueprints: int, ramps: int) -> FactoredDiscrete:
    """Action space of op, slot given op, blueprint and ramp."""
    ops = tuple(op.value for op in Op)
    return FactoredDiscrete(
        (
            Head("op", len(ops)),
            Head("slot", slots, used_by=ops[1:], conditioned=True),
            Head("blueprint", blueprints, used_by=(Op.GERMINATE.value,)),
            Head("ramp", ramps, used_by=(Op.BLEND.value,)),
        )
    )


def action_mask(legal: Bool[Tensor, "B O S"], blueprints: int, ramps: int) -> Bool[Tensor, "B K"]:
    """Masks of the heads one after another, in the layout of ``FactoredDiscrete``.

    An op is allowed where it is legal for a slot. For an op that is not allowed, or that needs no
    slot, all slots are allowed, because the mask of these slots is never used.
    """
    op = legal.any(2)
    op[:, Op.WAIT].fill_(True)
    slot = legal | ~legal.any(2, keepdim=True)
    free = legal.new_ones(legal.shape[0], blueprints + ramps)
    return torch.cat((op, slot.flatten(1), free), dim=1)


def feature_names(slots: int) -> list[str]:
    """The name of each feature, in order."""
    names = ["time"]
    names += [f"{what}_{k}" for what in ("loss", "accuracy") for k in range(HISTORY)]
    names += [f"last_op_{op.name.lower()}" for op in Op]
    names += [f"last_slot_{s}" for s in range(slots)]
    names += ["changed", "grown"]
    for s in range(slots):
        names += [f"slot{s}_stage_{stage.name.lower()}" for stage in Stage]
        names += [f"slot{s}_blueprint_{name}" for name in BLUEPRINTS]
        names += [
            f"slot{s}_{what}"
            for what in (
                "alpha",
                "epochs_in_stage",
                "age",
                "contribution",
                "freshness",
                "grad_norm",
                "gain_since_germination",
            )
        ]
    return names


def observe(
    slots: Slots,
    vitals: Vitals,
    grown: Float[Tensor, " B"],
    *,
    epochs: int,
    classes: int,
    hide_training: bool = False,
) -> Float[Tensor, "B O"]:
    """Features in the order of ``feature_names``.

    Args:
        slots: Life cycle of the slots.
        vitals: Measurements and history of each host.
        grown: Number of grown parameters over number of host parameters.
        epochs: Number of epochs of an episode.
        classes: Number of classes of the data.
        hide_training: Whether features that are measured in the training of a host are 0.
    """
    if hide_training:
        vitals = vitals._replace(
            losses=torch.zeros_like(vitals.losses),
            accuracies=torch.zeros_like(vitals.accuracies),
            contribution=torch.zeros_like(vitals.contribution),
            germination_accuracy=torch.zeros_like(vitals.germination_accuracy),
            grad_norm=torch.zeros_like(vitals.grad_norm),
        )
    count = slots.stage.shape[1]
    dtype = grown.dtype
    live = is_in(slots.stage, LIVE)
    guess = math.log(classes)
    losses = (vitals.losses / guess).nan_to_num(_MAX_LOSS, _MAX_LOSS, 0.0).clamp(max=_MAX_LOSS)
    shared = torch.cat(
        (
            (vitals.step / epochs).unsqueeze(1),
            losses,
            vitals.accuracies,
            _one_hot(vitals.last_op, len(Op)),
            _one_hot(vitals.last_slot, count),
            vitals.changed.unsqueeze(1),
            grown.unsqueeze(1),
        ),
        dim=1,
    )
    rise = (vitals.accuracies[:, :1] - vitals.germination_accuracy).masked_fill(~live, 0.0)
    numbers = torch.stack(
        (
            slots.alpha,
            slots.epochs_in_stage / epochs,
            slots.age / epochs,
            _CONTRIBUTION_SCALE * vitals.contribution,
            (1 / (1 + vitals.contribution_age.to(dtype))).masked_fill(~slots.measured, 0.0),
            vitals.grad_norm.nan_to_num(0.0, 0.0, 0.0).log1p(),
            rise,
        ),
        dim=2,
    )
    blueprint = _one_hot(slots.blueprint, len(BLUEPRINTS)) & live.unsqueeze(2)
    stage = _one_hot(slots.stage, len(Stage))
    each = torch.cat((stage.to(dtype), blueprint.to(dtype), numbers), dim=2)
    return torch.cat((shared.to(dtype), each.flatten(1)), dim=1)


def _one_hot(index: Int[Tensor, "*N"], count: int) -> Bool[Tensor, "*N K"]:
    """``functional.one_hot``, which reads the index on the host to check its range."""
    return index.unsqueeze(-1) == torch.arange(count, device=index.device)
