"""The life cycle of a seed: one table of legal transitions, from which masks and moves derive.

Axes: ``B`` environment, ``S`` slot. Ops are applied only where they are legal, whatever action a
policy chooses.
"""

import math
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int

__all__ = [
    "ATTACHED",
    "DEVELOPING",
    "JUDGED",
    "LIVE",
    "TRANSITIONS",
    "Action",
    "LifeCycle",
    "Op",
    "RampShape",
    "Slots",
    "Stage",
    "is_in",
]

RampShape = Literal["linear", "cosine", "sigmoid"]


class Stage(IntEnum):
    """Stage of the life of a slot."""

    DORMANT = 0  # empty
    TRAINING = 1  # in isolation: the seed does not affect the host
    BLENDING = 2  # alpha rises
    HOLDING = 3  # alpha is 1, still to be judged
    FOSSILIZED = 4  # part of the host for good
    FADING = 5  # pruned, alpha falls
    EMBARGOED = 6  # empty, cooling down


class Op(IntEnum):
    """Operation that the agent may choose in a step."""

    WAIT = 0
    GERMINATE = 1
    BLEND = 2
    FOSSILIZE = 3
    PRUNE = 4


TRANSITIONS: dict[tuple[Stage, Op], Stage] = {
    (Stage.DORMANT, Op.GERMINATE): Stage.TRAINING,
    (Stage.TRAINING, Op.BLEND): Stage.BLENDING,
    (Stage.TRAINING, Op.PRUNE): Stage.EMBARGOED,
    (Stage.BLENDING, Op.PRUNE): Stage.FADING,
    (Stage.HOLDING, Op.PRUNE): Stage.FADING,
    (Stage.HOLDING, Op.FOSSILIZE): Stage.FOSSILIZED,
}
"""Stage of a slot after an op; ops that are not listed are illegal. The other transitions happen by
themselves: BLENDING becomes HOLDING, FADING becomes EMBARGOED, EMBARGOED becomes DORMANT."""

LIVE = (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED, Stage.FADING)
ATTACHED = (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED, Stage.FADING)
DEVELOPING = (Stage.TRAINING, Stage.BLENDING)
JUDGED = (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FADING)  # contribution is measured


class Action(NamedTuple):
    """An action, with one choice for each head."""

    op: Int[Tensor, " B"]
    slot: Int[Tensor, " B"]
    blueprint: Int[Tensor, " B"]
    ramp: Int[Tensor, " B"]  # index into the choices of alpha epochs


class Slots(NamedTuple):
    """Life cycle of all slots."""

    stage: Int[Tensor, "B S"]
    blueprint: Int[Tensor, "B S"]  # meaningful where live
    alpha: Float[Tensor, "B S"]  # share of the seed in the network
    ramp_epochs: Int[Tensor, "B S"]
    fade_from: Float[Tensor, "B S"]  # alpha when pruned
    epochs_in_stage: Int[Tensor, "B S"]  # including the epoch that is being trained
    age: Int[Tensor, "B S"]  # epochs since germination
    measured: Bool[Tensor, "B S"]  # whether the contribution of this seed is known

    @classmethod
    def empty(
        cls, num_envs: int, slots: int, *, dtype: torch.dtype, device: torch.device
    ) -> "Slots":
        """Slots that are all dormant."""
        zeros = torch.zeros(num_envs, slots, dtype=torch.int64, device=device)
        share = zeros.to(dtype)
        return cls(zeros, zeros, share, zeros + 1, share, zeros, zeros, zeros.bool())


class LifeCycle:
    """The table of transitions as tensors on a device, with the settings that restrict it.

    Attributes:
        ramps: Number of durations of blending that the agent can choose.
    """

    def __init__(
        self,
        *,
        ramp_choices: tuple[int, ...],
        ramp_shape: RampShape,
        min_training_epochs: int,
        min_dormant_epochs: int,
        fade_epochs: int,
        cooldown_epochs: int,
        device: torch.device,
    ) -> None:
        table = torch.full((len(Stage), len(Op)), -1, dtype=torch.int64)
        for (stage, op), after in TRANSITIONS.items():
            table[stage, op] = after
        self._table = table.to(device)
        self._ramp_choices = torch.tensor(ramp_choices, device=device)
        self._ramp_shape: RampShape = ramp_shape
        self.ramps = len(ramp_choices)
        self._min_training_epochs = min_training_epochs
        self._min_dormant_epochs = min_dormant_epochs
        self._fade_epochs, self._cooldown_epochs = fade_epochs, cooldown_epochs

    def legal(self, slots: Slots) -> Bool[Tensor, "B O S"]:
        """Which op may be applied to which slot; WAIT has no slot and is False for all slots."""
        legal = (self._table[slots.stage] >= 0).transpose(1, 2).clone()  # [B, S, O] -> [B, O, S]
        busy = is_in(slots.stage, DEVELOPING).any(1, keepdim=True)
        legal[:, Op.GERMINATE] &= ~busy & (slots.epochs_in_stage >= self._min_dormant_epochs)
        legal[:, Op.BLEND] &= slots.epochs_in_stage >= self._min_training_epochs
        legal[:, Op.FOSSILIZE] &= slots.measured
        return legal

    def apply(self, slots: Slots, action: Action) -> tuple[Slots, Bool[Tensor, "B S"]]:
        """Apply the action where it is legal; also return the slots that the action changed."""
        op = action.op.clamp(0, len(Op) - 1)
        chosen = torch.arange(slots.stage.shape[1], device=op.device) == action.slot.unsqueeze(1)
        row = torch.arange(op.shape[0], device=op.device)
        changed = self.legal(slots)[row, op] & chosen
        germinated = changed & (op == Op.GERMINATE).unsqueeze(1)
        blended = changed & (op == Op.BLEND).unsqueeze(1)
        pruned = changed & (op == Op.PRUNE).unsqueeze(1)
        after = self._table[slots.stage, op.unsqueeze(1)]
        ramp = self._ramp_choices[action.ramp.clamp(0, self._ramp_choices.shape[0] - 1)]
        return slots._replace(
            stage=torch.where(changed, after, slots.stage),
            blueprint=torch.where(germinated, action.blueprint.unsqueeze(1), slots.blueprint),
            ramp_epochs=torch.where(blended, ramp.unsqueeze(1), slots.ramp_epochs),
            fade_from=torch.where(pruned, slots.alpha, slots.fade_from),
            epochs_in_stage=slots.epochs_in_stage.masked_fill(changed, 0),
            age=slots.age.masked_fill(germinated, 0),
            measured=slots.measured & ~germinated,
        ), changed

    def tick(self, slots: Slots) -> Slots:
        """Begin an epoch: move alpha, and make the transitions that happen by themselves."""
        stage = slots.stage
        blending, fading = stage == Stage.BLENDING, stage == Stage.FADING
        epochs = slots.epochs_in_stage + 1
        share = (epochs / slots.ramp_epochs).clamp(max=1.0).to(slots.alpha.dtype)
        rising = ramp(share, self._ramp_shape)
        falling = slots.fade_from * (1 - epochs / self._fade_epochs).clamp(min=0.0)
        alpha = torch.where(blending, rising, torch.where(fading, falling, slots.alpha))
        held = blending & (epochs >= slots.ramp_epochs)
        gone = fading & (epochs >= self._fade_epochs)
        free = (stage == Stage.EMBARGOED) & (epochs > self._cooldown_epochs)
        after = stage.masked_fill(held, Stage.HOLDING)
        after = after.masked_fill(gone, Stage.EMBARGOED).masked_fill(free, Stage.DORMANT)
        live = is_in(after, LIVE)
        return slots._replace(
            stage=after,
            alpha=alpha.masked_fill(held, 1.0).masked_fill(~is_in(after, ATTACHED), 0.0),
            epochs_in_stage=epochs.masked_fill(held | gone | free, 1),
            age=(slots.age + 1).masked_fill(~live, 0),
            measured=slots.measured & live,
        )


def ramp(share: Float[Tensor, "*N"], shape: RampShape) -> Float[Tensor, "*N"]:
    """Alpha after a share of the ramp: from 0 at 0 to 1 at 1."""
    if shape == "linear":
        return share
    if shape == "cosine":
        return 0.5 - 0.5 * (share * torch.pi).cos()
    steep = (12.0 * (share - 0.5)).sigmoid()
    low = 1 / (1 + math.exp(6.0))
    return (steep - low) / (1 - 2 * low)


def is_in(stage: Int[Tensor, "*N"], stages: tuple[Stage, ...]) -> Bool[Tensor, "*N"]:
    """Whether each stage is one of ``stages``."""
    found = stage == stages[0]
    for other in stages[1:]:
        found = found | (stage == other)
    return found
