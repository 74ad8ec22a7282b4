"""The trainer of hosts: an epoch of SGD, and measurements, on data that does not change.

Axes: ``B`` environment, ``S`` slot, ``K`` class. The trainer chooses between the computations of
``training``, by operations of torch, and those of ``native``, and how many hosts are computed at
once.
"""

import torch
from torch import Tensor

from esper_lightning.compiling.loops import compile_function, native_or_slower
from esper_lightning.envs.morphogenesis.data import Split, Splits
from esper_lightning.envs.morphogenesis.host import Architecture
from esper_lightning.envs.morphogenesis.layout import unflatten
from esper_lightning.envs.morphogenesis.lifecycle import Slots
from esper_lightning.envs.morphogenesis.native import NativeHosts
from esper_lightning.envs.morphogenesis.network import Weights
from esper_lightning.envs.morphogenesis.population import (
    Kinds,
    KindSampler,
    Population,
    Traits,
)
from esper_lightning.envs.morphogenesis.state import Hosts, place_of
from esper_lightning.envs.morphogenesis.streams import Purpose, integers
from esper_lightning.envs.morphogenesis.training import (
    SGD,
    Measured,
    Trained,
    measure,
    static_update,
    train,
)

__all__ = ["HostTrainer"]

_CACHE_BYTES = 8 << 20  # bytes of activations of the first block of a chunk
_IMAGES = 150  # most images that a chunk evaluates at once in validation


class HostTrainer:
    """Trains and measures hosts.

    Args:
        architecture: Layers of the hosts.
        blueprints: Names of the modules that can be grown.
        sgd: Settings of SGD.
        splits: Data of training, validation and test, on the device of the hosts and in their
            dtype.
        train_batches: Number of SGD updates in an epoch.
        batch_size: Number of images in an update.
        static: Whether every computation runs for every host, because reading which hosts need it
            would wait for the device.
        compiled: Whether the hosts run as native code on a CPU, in float32; ``None`` for whether
            that is possible. On CUDA, whether Inductor compiles static updates; ``None`` for no.
        population: Choices for what a host is like; ``None`` for hosts that are all alike.

    Attributes:
        chunk: Number of hosts that operations of torch compute at once; ``None`` for all hosts.
        sampler: Sampler of kinds and their batches; ``None`` where all hosts are alike.

    Raises:
        ValueError: If ``compiled`` is True and native code cannot be compiled.
    """

    def __init__(
        self,
        architecture: Architecture,
        blueprints: tuple[str, ...],
        sgd: SGD,
        splits: Splits,
        *,
        train_batches: int,
        batch_size: int,
        static: bool,
        compiled: bool | None = False,
        population: Population | None = None,
    ) -> None:
        self.architecture, self.blueprints, self.splits = architecture, blueprints, splits
        self.static = static
        self._sgd, self._train_batches, self._batch_size = sgd, train_batches, batch_size
        self.chunk: int | None = None
        self._images_at_once = splits.validation.label.shape[0]
        image = splits.training.image
        self.sampler = None
        if population is not None:
            self.sampler = KindSampler(
                population,
                splits.training.label,
                classes=architecture.classes,
                channels=architecture.channels,
                dtype=image.dtype,
            )
        self._update = None
        if static:
            update = static_update(architecture, sgd)
            mode = "default" if compiled and image.device.type == "cuda" else "off"
            self._update = compile_function(
                "update of hosts", update, mode=mode, device=image.device
            )
        self._native: NativeHosts | None = None
        if image.device.type == "cpu":
            if not static and compiled is not False and image.dtype == torch.float32:
                self._native = native_or_slower(
                    "training of hosts",
                    lambda: NativeHosts(architecture, sgd),
                    required="Morphogenesis.compiled" if compiled else None,
                )
            area = architecture.channels[0] * architecture.image[1] ** 2
            self.chunk = max(1, _CACHE_BYTES // (batch_size * area * image.element_size()))
            self._images_at_once = _IMAGES

    def kinds(self, hosts: Hosts, seed: int) -> Kinds | None:
        """The kinds of the hosts; ``None`` where all hosts are alike."""
        return None if self.sampler is None else self.sampler.kinds(seed, hosts.episode)

    def train(self, hosts: Hosts, slots: Slots, seed: int, kinds: Kinds | None = None) -> Trained:
        """One epoch of SGD on random images, which changes weights and velocity in place.

        Args:
            hosts: Hosts to train.
            slots: Slots of the hosts in this epoch.
            seed: Seed of all random numbers.
            kinds: Kinds of the hosts, from ``kinds``.
        """
        training, place = self.splits.training, place_of(hosts)
        shape = (self._train_batches, self._batch_size)
        count, high = shape[0] * shape[1], training.label.shape[0]
        if self.sampler is None or kinds is None:
            index = integers(seed, Purpose.BATCHES, place, count=count, high=high)
            label = training.label[index]
        else:
            index, label = self.sampler.batches(seed, kinds, place, count=count)
        index, label = unflatten(index, 1, shape), unflatten(label, 1, shape)
        if self._native is not None:
            traits = self._traits(len(index), kinds)
            return self._native.train(
                hosts.weights, hosts.velocity, slots, training.image, label, index, traits
            )
        return train(
            hosts.weights,
            hosts.velocity,
            slots,
            training.image,
            index,
            label,
            None if kinds is None else kinds.traits,
            self.architecture,
            self._sgd,
            enabled=self.blueprints,
            chunk=self._chunk_of(index),
            static=self._update,
        )

    def measure(
        self,
        weights: Weights,
        slots: Slots,
        split: Split,
        kinds: Kinds | None = None,
        *,
        switch: bool = True,
    ) -> Measured:
        """Loss and accuracy on a split and, with ``switch``, the contribution of each slot."""
        if self._native is not None:
            traits = self._traits(len(slots.stage), kinds)
            return self._native.measure(weights, slots, *split, traits, switch=switch)
        return measure(
            weights,
            slots,
            *split,
            None if kinds is None else kinds.traits,
            self.architecture,
            enabled=self.blueprints,
            chunk=self._chunk_of(slots.stage),
            images_at_once=self._images_at_once,
            static=self.static,
            switch=switch,
        )

    def _traits(self, hosts: int, kinds: Kinds | None) -> Traits:
        """The traits of the hosts, which are the same for all where hosts are alike."""
        if kinds is not None:
            return kinds.traits
        architecture = self.architecture
        return Traits(
            torch.full((hosts,), self._sgd.learning_rate),
            torch.ones(hosts, architecture.classes, dtype=torch.bool),
            torch.tensor(architecture.channels).expand(hosts, -1),
        )

    def _chunk_of(self, rows: Tensor) -> int:
        return rows.shape[0] if self.chunk is None else self.chunk
