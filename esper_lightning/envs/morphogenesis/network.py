"""Hosts with their seeds, run as they are (the trunk) and with a slot switched (the branches).

Axes: ``M`` image, ``N`` host, ``S`` slot, ``E`` branch. A branch is a host with one of its slots
switched: off where it is attached, on where it trains in isolation. It leaves the trunk at that
slot, so what comes before is computed once.

Who runs what is planned before, from the stages alone. A plan that reads them names the hosts that
a computation concerns; where reading would wait for the device the plan is static: everything runs
for everyone, and gates decide.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS, FAMILIES, residual
from esper_lightning.envs.morphogenesis.host import (
    Architecture,
    gather_hosts,
    image_loss,
    run_block,
)
from esper_lightning.envs.morphogenesis.layout import unflatten
from esper_lightning.envs.morphogenesis.lifecycle import ATTACHED, JUDGED, Slots, Stage, is_in

__all__ = ["Losses", "Plan", "Weights", "plan_training", "plan_validation", "run"]


class Weights(NamedTuple):
    """Parameters and running statistics of ``N`` hosts."""

    host: Tensor  # [N, P]
    seeds: tuple[Tensor, ...]  # of each slot [N, P of the slot]
    means: tuple[Tensor, ...]  # of each block [N, C]
    variances: tuple[Tensor, ...]


class _Bucket(NamedTuple):
    """Seeds of one family in one slot."""

    family: str
    names: tuple[str, ...]  # blueprints among them
    position: Tensor | None  # [n] on the host axis of the activation; None: everywhere, in order
    host: Tensor  # [n] whose parameters
    kind: Tensor  # [n]
    gate: Tensor  # [n]
    learns: Tensor | None  # [n] bool: whose parameters get gradients; None: all


class _Level(NamedTuple):
    """What happens in one slot."""

    trunk: list[_Bucket]
    joins: Tensor | None  # [j] hosts of the branches that begin here
    branches: list[_Bucket]
    host: Tensor | None  # [e] host of every branch that runs here


class Plan(NamedTuple):
    """Who runs what."""

    levels: list[_Level]
    branch_host: Tensor | None  # [E]
    branch_slot: Tensor | None  # [E]
    branch_counts: Tensor | None  # [E] bool: False for what is computed for nobody


class Losses(NamedTuple):
    """Per image: loss in nats, and 1 where it is classified right."""

    trunk: tuple[Tensor, Tensor]  # [N, M]
    branches: tuple[Tensor, Tensor] | None  # [E, M]


def plan_training(slots: Slots, enabled: tuple[str, ...], *, static: bool) -> Plan:
    """Branches: hosts with a slot that trains in isolation, in which that slot is on."""
    training = slots.stage == Stage.TRAINING
    if not static:
        return _plan(slots, training)
    # One branch for each host, from the first slot on; whose nothing trains runs for nothing.
    hosts = torch.arange(training.shape[0], device=training.device)
    first = torch.zeros_like(hosts)
    gate = torch.where(training, 1.0, _trunk_gate(slots))
    return _plan_static(slots, enabled, hosts, first, gate, training, training.any(1))


def plan_validation(
    slots: Slots, enabled: tuple[str, ...], *, static: bool, switch: bool = True
) -> Plan:
    """Branches, if ``switch``: a host for each slot to be judged, with that slot switched."""
    judged = is_in(slots.stage, JUDGED) & switch
    if not static:
        return _plan(slots, judged)
    hosts, count = judged.shape
    host = torch.arange(hosts, device=judged.device).repeat(count)
    slot = torch.arange(count, device=judged.device).repeat_interleave(hosts)
    gate = _switched(slots, host, slot)
    learns = torch.zeros_like(gate, dtype=torch.bool)
    return _plan_static(slots, enabled, host, slot, gate, learns, judged.T.flatten())


def run(
    weights: Weights,
    architecture: Architecture,
    image: Float[Tensor, "M NC H W"],
    label: Int[Tensor, "N M"],
    plan: Plan,
    *,
    training: bool,
) -> Losses:
    """Losses of trunk and branches.

    In training, batch norm uses the batch and the trunk updates the running statistics in place;
    gradients of a branch reach the seed that trains in it and nothing else.
    """
    blocks, head, bias = architecture.unpack(weights.host)
    hosts = weights.host.shape[0]
    h, branch, branch_hosts = image, None, None
    for level, (block, seeds, mean, variance) in zip(
        plan.levels,
        zip(blocks, weights.seeds, weights.means, weights.variances, strict=True),
        strict=True,
    ):
        h = run_block(h, block, mean, variance, training=training)
        if branch is not None:
            assert branch_hosts is not None
            rows = (
                (None, None)
                if training
                else (mean.index_select(0, branch_hosts), variance.index_select(0, branch_hosts))
            )
            branch = run_block(branch, block.of(branch_hosts), *rows, training=training)
        if level.joins is not None:
            started = gather_hosts(h.detach(), hosts, level.joins)
            branch = started if branch is None else torch.cat((branch, started), dim=1)
        branch_hosts = level.host
        if branch is not None:
            assert branch_hosts is not None
            branch = _grow(branch, branch_hosts.shape[0], seeds, level.branches)
        h = _grow(h, hosts, seeds, level.trunk)
    trunk = image_loss(h, head, bias, label)
    if branch is None:
        return Losses(trunk, None)
    assert branch_hosts is not None
    head, bias = (t.detach().index_select(0, branch_hosts) for t in (head, bias))
    return Losses(trunk, image_loss(branch, head, bias, label.index_select(0, branch_hosts)))


def _grow(h: Tensor, hosts: int, seeds: Tensor, buckets: list[_Bucket]) -> Tensor:
    """Add what the seeds of a slot contribute."""
    grown = h
    for bucket in buckets:
        row = seeds.index_select(0, bucket.host)
        # What is not in the network must not reach it as 0 * inf either.
        row = torch.where((bucket.gate != 0).unsqueeze(1), row, 0.0)
        if bucket.learns is not None:
            row = torch.where(bucket.learns.unsqueeze(1), row, row.detach())
        if bucket.position is None:
            part = residual(bucket.family, bucket.names, h, row, bucket.kind, bucket.gate)
            grown = grown + part
            continue
        mine = gather_hosts(h, hosts, bucket.position)
        part = residual(bucket.family, bucket.names, mine, row, bucket.kind, bucket.gate)
        count = bucket.position.shape[0]
        wide = unflatten(grown.permute(0, 2, 3, 1), 3, (hosts, -1))  # [M, H, W, N, C]
        narrow = unflatten(part.permute(0, 2, 3, 1), 3, (count, -1))
        grown = wide.index_add(3, bucket.position, narrow).flatten(3).permute(0, 3, 1, 2)
    return grown


def _trunk_gate(slots: Slots) -> Float[Tensor, "N S"]:
    return slots.alpha.masked_fill(~is_in(slots.stage, ATTACHED), 0.0)


def _switched(
    slots: Slots, host: Int[Tensor, " E"], slot: Int[Tensor, " E"]
) -> Float[Tensor, "E S"]:
    """Gates of branches: those of the trunk but for one slot."""
    gate = _trunk_gate(slots)[host]
    on = (slots.stage == Stage.TRAINING)[host].to(gate.dtype)
    chosen = torch.arange(gate.shape[1], device=gate.device) == slot.unsqueeze(1)
    return torch.where(chosen, on, gate)


def _plan(slots: Slots, switched: Bool[Tensor, "N S"]) -> Plan:
    """A plan that names the hosts concerned, from stages that can be read."""
    hosts, count = switched.shape
    everyone = torch.arange(hosts)
    trunk = _trunk_gate(slots)
    # By slot, then host.
    slot, host = switched.T.nonzero(as_tuple=True)
    counts = torch.ones_like(host, dtype=torch.bool)
    first = int((slot == slot[0]).sum()) if len(slot) else 0
    if first == 1 and hosts > 1:
        # A convolution of one group takes another path, with other roundings: run it twice.
        slot, host = torch.cat((slot[:1], slot)), torch.cat((host[:1], host))
        counts = torch.cat((torch.zeros(1, dtype=torch.bool), counts))
    gate = _switched(slots, host, slot)
    isolated = (slots.stage == Stage.TRAINING)[host] & (torch.arange(count) == slot.unsqueeze(1))
    levels: list[_Level] = []
    for s in range(count):
        began, begins = host[slot <= s], host[slot == s]
        levels.append(
            _Level(
                _buckets(everyone, slots.blueprint[:, s], trunk[:, s], None, hosts),
                begins if len(begins) else None,
                _buckets(
                    began,
                    slots.blueprint[began, s],
                    gate[slot <= s, s],
                    isolated[slot <= s, s],
                    hosts,
                ),
                began if len(began) else None,
            )
        )
    if not len(host):
        return Plan(levels, None, None, None)
    return Plan(levels, host, slot, counts)


def _buckets(
    host: Tensor,
    kind: Tensor,
    gate: Tensor,
    learns: Tensor | None,
    hosts: int,
) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    active = gate != 0
    if not bool(active.any()):
        return buckets
    present = set(cast(list[int], kind[active].tolist()))
    for family, members in FAMILIES.items():
        names = tuple(name for name in members if BLUEPRINTS.index(name) in present)
        if not names:
            continue
        mine = active & _is_one_of(kind, names)
        position = mine.nonzero().squeeze(1)
        factor = gate[position]
        if len(position) == 1 and hosts > 1:  # see _plan
            position = position.repeat(2)
            factor = torch.cat((factor, torch.zeros_like(factor)))
        everywhere = len(position) == len(host) and bool(mine.all())
        buckets.append(
            _Bucket(
                family,
                names,
                None if everywhere else position,
                host[position],
                kind[position],
                factor,
                None if learns is None else learns[position],
            )
        )
    return buckets


def _plan_static(
    slots: Slots,
    enabled: tuple[str, ...],
    host: Tensor,
    slot: Tensor,
    gate: Tensor,
    learns: Tensor,
    counts: Tensor,
) -> Plan:
    """The same work whatever the stages are: every family for every host."""
    hosts, count = slots.stage.shape
    everyone = torch.arange(hosts, device=host.device)
    trunk = _trunk_gate(slots)
    begin = slot.shape[0] // hosts  # branches of a host: one, or one a slot
    levels: list[_Level] = []
    for s in range(count):
        joins = everyone if s < begin else None
        so_far = min(s + 1, begin) * hosts
        began = host[:so_far]
        kind = slots.blueprint[:, s]
        levels.append(
            _Level(
                _static(everyone, kind, trunk[:, s], None, enabled),
                joins,
                _static(began, kind[began], gate[:so_far, s], learns[began, s], enabled),
                began,
            )
        )
    return Plan(levels, host, slot, counts)


def _static(
    host: Tensor, kind: Tensor, gate: Tensor, learns: Tensor | None, enabled: tuple[str, ...]
) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    for family, members in FAMILIES.items():
        names = tuple(name for name in members if name in enabled)
        if names:
            mine = _is_one_of(kind, names)
            factor = gate.masked_fill(~mine, 0.0)
            buckets.append(_Bucket(family, names, None, host, kind, factor, learns))
    return buckets


def _is_one_of(kind: Tensor, names: tuple[str, ...]) -> Tensor:
    found = kind == BLUEPRINTS.index(names[0])
    for name in names[1:]:
        found = found | (kind == BLUEPRINTS.index(name))
    return found
