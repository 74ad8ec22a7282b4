"""The state of all environments, and the initial state of hosts and seeds.

Axes: ``B`` environment, ``S`` slot, ``P`` parameter. Initial parameters are sampled from normal
distributions, with streams that depend on the seed, the environment and the episode alone.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.core.tensor_trees import map_tree
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS, Part, parts
from esper_lightning.envs.morphogenesis.host import Architecture
from esper_lightning.envs.morphogenesis.lifecycle import Slots
from esper_lightning.envs.morphogenesis.network import Weights
from esper_lightning.envs.morphogenesis.observation import HISTORY, Vitals
from esper_lightning.envs.morphogenesis.streams import Place, Purpose, normals

__all__ = ["HostInitializer", "Hosts", "place_of"]


class Hosts(NamedTuple):
    """Everything that determines the future of the environments."""

    weights: Weights
    velocity: Weights
    slots: Slots
    vitals: Vitals
    episode: Int[Tensor, " B"]
    episode_return: Float[Tensor, " B"]
    seed: Int[Tensor, ""]  # of all random numbers


def place_of(hosts: Hosts) -> Place:
    """Positions of the environments in their streams of random numbers."""
    env = torch.arange(hosts.episode.shape[0], device=hosts.episode.device)
    return Place(env, hosts.episode, hosts.vitals.step)


class HostInitializer:
    """Creates hosts and seeds that have not been trained.

    Args:
        architecture: Layers of the hosts.
        blueprints: Names of the modules that can be grown.
        device: Device of hosts and seeds.
        dtype: Dtype of their parameters.

    Attributes:
        kinds: Position in ``BLUEPRINTS`` of each module that can be grown.
    """

    def __init__(
        self,
        architecture: Architecture,
        blueprints: tuple[str, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._architecture, self._device, self._dtype = architecture, device, dtype
        self._host = _distribution([architecture.parts()], device)
        self._seeds = [
            _distribution([[*parts(name, channels).values()] for name in blueprints], device)
            for channels in architecture.channels
        ]
        self.kinds = torch.tensor([BLUEPRINTS.index(name) for name in blueprints]).to(device)

    def hosts(self, seed: int, episode: Int[Tensor, " B"]) -> Hosts:
        """Hosts at the beginning of the given episodes."""
        architecture, count = self._architecture, episode.shape[0]
        slots = len(architecture.channels)
        mean, std = self._host
        start = torch.zeros_like(episode)
        place = Place(torch.arange(count, device=self._device), episode, start)
        drawn = normals(seed, Purpose.HOST, place, count=mean.shape[1])
        host = (mean + std * drawn).to(self._dtype)
        zeros = host.new_zeros
        seeds = tuple(zeros(count, mean.shape[1]) for mean, _ in self._seeds)
        means = tuple(zeros(count, channels) for channels in architecture.channels)
        ones = tuple(mean + 1.0 for mean in means)
        share, classes = zeros(count, slots), architecture.classes
        vitals = Vitals(
            step=start,
            losses=zeros(count, HISTORY) + math.log(classes),
            accuracies=zeros(count, HISTORY) + 1 / classes,
            contribution=share,
            contribution_age=share.long(),
            germination_accuracy=share,
            grad_norm=share,
            last_op=start,
            last_slot=start,
            changed=start.bool(),
        )
        fresh = Hosts(
            Weights(host, seeds, means, ones),
            Weights(torch.zeros_like(host), tuple(map(torch.zeros_like, seeds)), (), ()),
            Slots.empty(count, slots, dtype=self._dtype, device=self._device),
            vitals,
            episode,
            zeros(count),
            torch.full((), seed, dtype=torch.int64, device=self._device),
        )
        return map_tree(torch.clone, fresh)  # no tensor shares memory with another

    def germinate(
        self,
        seed: int,
        hosts: Hosts,
        slots: Slots,
        germinated: Bool[Tensor, "B S"],
        *,
        static: bool,
    ) -> None:
        """Write new parameters where a seed has germinated.

        Args:
            seed: Seed of all random numbers.
            hosts: Current hosts, whose parameters are overwritten in place.
            slots: Slots that name the blueprint of each seed.
            germinated: Whether a seed has germinated in a slot.
            static: Whether to sample for every host, because reading ``germinated`` would wait for
                the device.
        """
        rows = None if static else germinated.any(1).nonzero().squeeze(1)
        if rows is not None and rows.shape[0] == 0:
            return
        place = place_of(hosts)
        if rows is not None:
            place = Place(*(axis[rows] for axis in place))
        most = max(mean.shape[1] for mean, _ in self._seeds)
        drawn = normals(seed, Purpose.SEED, place, count=most)
        for s, (mean, std) in enumerate(self._seeds):
            mine, kind = germinated[:, s], slots.blueprint[:, s]
            if rows is not None:
                mine, kind = mine[rows], kind[rows]
            # Position among the settings' blueprints; a slot that did not germinate may have none.
            at = (kind.unsqueeze(1) == self.kinds).int().argmax(1)
            fresh = (mean[at] + std[at] * drawn[:, : mean.shape[1]]).to(self._dtype)
            _overwrite(hosts.weights.seeds[s], fresh, mine, rows)
            _overwrite(hosts.velocity.seeds[s], torch.zeros_like(fresh), mine, rows)


def _overwrite(target: Tensor, fresh: Tensor, mine: Tensor, rows: Tensor | None) -> None:
    if rows is None:
        target.copy_(torch.where(mine.unsqueeze(1), fresh, target))
    else:
        target[rows[mine]] = fresh[mine]


def _distribution(rows: list[list[Part]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[*, P]`` of each parameter; a row is padded with zeros at its end."""
    most = max(sum(part.size for part in row) for row in rows)
    mean = torch.zeros(len(rows), most, dtype=torch.float64)
    std = torch.zeros_like(mean)
    for number, row in enumerate(rows):
        start = 0
        for part in row:
            mean[number, start : start + part.size] = part.mean
            std[number, start : start + part.size] = part.std
            start += part.size
    return mean.to(device), std.to(device)
