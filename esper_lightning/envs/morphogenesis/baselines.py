"""Baselines: fixed rules that use the state of the environment and its action mask.

Axes: ``B`` environment, ``S`` slot. Each baseline returns a legal action ``[B, 4]`` without
waiting for the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Int
from esper_lightning.envs.morphogenesis.env import MorphogenesisEnv
from esper_lightning.envs.morphogenesis.lifecycle import Op, Stage
from esper_lightning.envs.morphogenesis.streams import Place, Purpose, uniforms

__all__ = [
    "BASELINES",
    "Baseline",
    "grow_at_start",
    "never_grow",
    "plateau",
    "random_legal",
    "schedule",
]

Baseline = Callable[[MorphogenesisEnv], Int[Tensor, "B 4"]]


def never_grow(env: MorphogenesisEnv) -> Int[Tensor, "B 4"]:
    """WAIT in every step: the host does not grow."""
    return torch.zeros(env.num_envs, 4, dtype=torch.int64, device=env.hosts.episode.device)


def random_legal(env: MorphogenesisEnv) -> Int[Tensor, "B 4"]:
    """A random legal op, then a random legal slot for the op, a random blueprint and ramp."""
    hosts = env.hosts
    number = torch.arange(env.num_envs, device=hosts.episode.device)
    place = Place(number, hosts.episode, hosts.vitals.step)
    drawn = uniforms(0, Purpose.POLICY, place, count=4)
    legal = env.legal()
    allowed = legal.any(2)
    allowed[:, Op.WAIT] = True
    op = _pick(allowed, drawn[:, 0])
    row = torch.arange(env.num_envs, device=op.device)
    slots = legal[row, op]
    slot = _pick(slots | (op == Op.WAIT).unsqueeze(1), drawn[:, 1])
    blueprint = (drawn[:, 2] * len(env.blueprints)).long()
    ramp = (drawn[:, 3] * env.lifecycle.ramps).long()
    return torch.stack((op, slot, blueprint, ramp), dim=1)


def grow_at_start(env: MorphogenesisEnv, *, blueprint: str = "conv_light") -> Int[Tensor, "B 4"]:
    """Germinate, blend and fossilize every slot as soon as that is legal, one after another."""
    legal = env.legal()
    return _first_legal(
        env, legal, (Op.FOSSILIZE, Op.BLEND, Op.GERMINATE), blueprint=blueprint, ramp=0
    )


@dataclass(frozen=True, kw_only=True)
class schedule:  # noqa: N801 - used like the functions beside it
    """Grow the same in every host: a blueprint in some slots, one after another, from an epoch on.

    A seed is blended as soon as that is legal, and is never fossilized: a seed that holds adds as
    much to its host, and costs no further intervention.

    Attributes:
        blueprint: Blueprint of every seed.
        slots: Slots that are grown, in any order; the first slot is grown first.
        start: Number of epochs before the first seed germinates.
        ramp: Index into the choices of the duration of blending.
    """

    blueprint: str
    slots: tuple[int, ...]
    start: int = 0
    ramp: int = 0

    def __call__(self, env: MorphogenesisEnv) -> Int[Tensor, "B 4"]:
        """An action for each environment."""
        wanted = _within(env.legal(), self.slots)
        wanted[:, Op.GERMINATE] &= (env.hosts.vitals.step >= self.start).unsqueeze(1)
        order = (Op.BLEND, Op.GERMINATE)
        return _first_legal(env, wanted, order, blueprint=self.blueprint, ramp=self.ramp)


@dataclass(frozen=True, kw_only=True)
class plateau:  # noqa: N801 - used like the functions beside it
    """Germinate when accuracy stops rising, blend trained seeds, fossilize seeds that contribute.

    Attributes:
        blueprint: Blueprint of every seed.
        rise: Accuracy that must be gained in ``window`` epochs; otherwise a seed is germinated.
        window: Number of epochs over which the rise is measured, at most 4. The first seed
            germinates after ``window`` + 1 epochs, or later.
        training_epochs: Number of epochs of training in isolation before blending.
        contribution: Accuracy that a seed must add to be fossilized when its alpha is 1.
        slots: Slots in which seeds germinate; ``None`` for all.
        below: Accuracy from which on no seed germinates.
        judges: Whether seeds are fossilized or pruned when their alpha is 1. If not, they stay as
            they are, which costs no intervention.
    """

    blueprint: str = "conv_light"
    rise: float = 0.02
    window: int = 3
    training_epochs: int = 2
    contribution: float = 0.01
    slots: tuple[int, ...] | None = None
    below: float = math.inf
    judges: bool = True

    def __call__(self, env: MorphogenesisEnv) -> Int[Tensor, "B 4"]:
        """An action for each environment."""
        hosts, legal = env.hosts, env.legal()
        accuracies, contribution = hosts.vitals.accuracies, hosts.vitals.contribution
        flat = accuracies[:, 0] - accuracies[:, self.window] < self.rise
        flat &= hosts.vitals.step > self.window
        trained = hosts.slots.epochs_in_stage >= self.training_epochs
        useful = contribution >= self.contribution
        held = hosts.slots.stage == Stage.HOLDING
        wanted = _within(legal, self.slots)
        wanted[:, Op.GERMINATE] &= (flat & (accuracies[:, 0] < self.below)).unsqueeze(1)
        wanted[:, Op.BLEND] &= trained
        wanted[:, Op.FOSSILIZE] &= useful & self.judges
        wanted[:, Op.PRUNE] &= held & ~useful & self.judges
        order = (Op.FOSSILIZE, Op.PRUNE, Op.BLEND, Op.GERMINATE)
        return _first_legal(env, wanted, order, blueprint=self.blueprint, ramp=0)


BASELINES: dict[str, Baseline] = {
    "never grow": never_grow,
    "grow at the start": grow_at_start,
    "random legal": random_legal,
    "plateau": plateau(),
}


def _within(legal: Bool[Tensor, "B O S"], slots: tuple[int, ...] | None) -> Bool[Tensor, "B O S"]:
    """A copy of what is legal, without the slots that are not named; ``None`` names all."""
    wanted = legal.clone()
    for slot in range(wanted.shape[2]):
        if slots is not None and slot not in slots:
            wanted[:, :, slot].fill_(False)
    return wanted


def _first_legal(
    env: MorphogenesisEnv,
    wanted: Bool[Tensor, "B O S"],
    order: tuple[Op, ...],
    *,
    blueprint: str,
    ramp: int,
) -> Int[Tensor, "B 4"]:
    """The first op of ``order`` that is wanted in a slot, in the first such slot; else WAIT."""
    op = torch.zeros(env.num_envs, dtype=torch.int64, device=wanted.device)
    for candidate in reversed(order):
        op = op.masked_fill(wanted[:, candidate].any(1), candidate)
    row = torch.arange(env.num_envs, device=wanted.device)
    slot = wanted[row, op].int().argmax(1)
    names = env.blueprints
    kind = names.index(blueprint) if blueprint in names else 0
    return torch.stack((op, slot, torch.full_like(op, kind), torch.full_like(op, ramp)), dim=1)


def _pick(allowed: Bool[Tensor, "B N"], unit: Tensor) -> Int[Tensor, " B"]:
    """A uniform choice among the allowed entries of a row, from a number in ``[0, 1)``."""
    rank = (unit * allowed.sum(1)).long().unsqueeze(1)
    return ((allowed.cumsum(1) - 1 == rank) & allowed).int().argmax(1)
