"""Hosts that differ in what they need: the kind of each host, and the images it is trained on.

Axes: ``B`` environment, ``K`` class of the data, ``N`` image of a batch, ``S`` slot. A kind is a
function of seed, environment and episode, so it is computed anew in each step and is no state.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from esper_lightning.core.errors import check_fields, require
from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.envs.morphogenesis.layout import split_columns
from esper_lightning.envs.morphogenesis.streams import Place, Purpose, integers, uniforms, words_at

__all__ = [
    "CIFAR_HELD_OUT",
    "CIFAR_KINDS",
    "DIGITS_HELD_OUT",
    "DIGITS_KINDS",
    "Batches",
    "KindSampler",
    "Kinds",
    "Population",
    "Traits",
]


@dataclass(frozen=True, kw_only=True)
class Population:
    """Choices for what a host is like; of each, a host has one, drawn evenly and independently.

    Attributes:
        classes: Numbers of classes that a host has to tell apart. Which classes is drawn, too.
        label_noise: Shares of training images with a wrong label, in [0, 1): the label of another
            class of the host, the same one for the whole episode.
        images_per_class: Numbers of training images of each class.
        learning_rate: Learning rates of SGD for the host and its seeds.
        width: Shares of the channels of each block that the host uses, in (0, 1]; the outputs of
            the others are 0 until a seed adds to them.
    """

    classes: tuple[int, ...] = (2, 10)
    label_noise: tuple[float, ...] = (0.0,)
    images_per_class: tuple[int, ...] = (64,)
    learning_rate: tuple[float, ...] = (0.05,)
    width: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        counts = "be a tuple of integers of at least "
        rules = {
            "classes": f"{counts}2",
            "label_noise": "be a tuple of numbers in [0, 1)",
            "images_per_class": f"{counts}1",
            "learning_rate": "be a tuple of positive numbers",
            "width": "be a tuple of numbers in (0, 1]",
        }
        check_fields(self, rules)
        for name, ok in (
            ("classes", all(value >= 2 for value in self.classes)),
            ("label_noise", all(0 <= value < 1 for value in self.label_noise)),
            ("images_per_class", all(value >= 1 for value in self.images_per_class)),
            ("learning_rate", all(0 < value < float("inf") for value in self.learning_rate)),
            ("width", all(0 < value <= 1 for value in self.width)),
        ):
            values = getattr(self, name)
            require(ok and len(values) > 0, f"Population.{name}", rules[name], values)

    def channels_used(self, width: float, channels: int) -> int:
        """Number of channels that a host of this width uses in a block: at least one."""
        return max(1, round(width * channels))


DIGITS_KINDS = Population(
    classes=(2, 8),
    label_noise=(0.0, 0.2),
    images_per_class=(12, 64),
    learning_rate=(0.05, 0.1, 0.2),
    width=(0.5, 1.0),
)
DIGITS_HELD_OUT = replace(DIGITS_KINDS, classes=(5, 10), label_noise=(0.1, 0.4))
CIFAR_KINDS = replace(DIGITS_KINDS, images_per_class=(100, 2000))
CIFAR_HELD_OUT = replace(CIFAR_KINDS, classes=(5, 10), label_noise=(0.1, 0.4))
"""Populations of the presets. No host of a population held out is of a kind of the other."""


class Traits(NamedTuple):
    """What of a kind the training and the measurement of a host depend on."""

    learning_rate: Float[Tensor, " B"]
    class_mask: Bool[Tensor, "B K"]  # True for the classes of the host
    channels_used: Int[Tensor, "B S"]  # outputs of a block; its other channels are 0

    def rows(self, index: Int[Tensor, " N"] | slice) -> "Traits":
        """The traits of some hosts."""
        return Traits(*(tensor[index] for tensor in self))


class Kinds(NamedTuple):
    """What each host is like."""

    classes: Int[Tensor, " B"]  # number of classes of the host
    class_order: Int[Tensor, "B K"]  # all classes of the data, those of the host first
    label_noise: Float[Tensor, " B"]
    images_per_class: Int[Tensor, " B"]
    first_image: Int[Tensor, "B K"]  # position among the images of a class
    width: Float[Tensor, " B"]
    traits: Traits


class Batches(NamedTuple):
    """Images to train on."""

    image: Int[Tensor, "B N"]  # position in the training split
    label: Int[Tensor, "B N"]  # with noise


class KindSampler:
    """Samples the kinds of hosts, and their batches, without lists of images for each host.

    Args:
        population: Choices for what a host is like.
        label: Labels ``[I]`` of the training split, on the device of the hosts.
        classes: ``K``, the number of classes of the data.
        channels: Number of channels of each block.
        dtype: Dtype of the hosts.
    """

    def __init__(
        self,
        population: Population,
        label: Int[Tensor, " I"],
        *,
        classes: int,
        channels: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        device = label.device
        self._order = label.argsort(stable=True)  # images, one class after another
        count = (label.unsqueeze(0) == torch.arange(classes, device=device).unsqueeze(1)).sum(1)
        self._class_size, self._class_start = count, count.cumsum(0) - count
        self._classes = torch.tensor(population.classes, device=device)
        self._images = torch.tensor(population.images_per_class, device=device)
        self._noise, self._learning_rate, self._width = (
            torch.tensor(choices, dtype=dtype, device=device)
            for choices in (population.label_noise, population.learning_rate, population.width)
        )
        used = [[population.channels_used(w, c) for c in channels] for w in population.width]
        self._channels_used = torch.tensor(used, device=device)

    def kinds(self, seed: int, episode: Int[Tensor, " B"]) -> Kinds:
        """The kinds of hosts.

        Args:
            seed: Seed of all random numbers.
            episode: Number of the episode of each environment.
        """
        env = torch.arange(episode.shape[0], device=episode.device)
        place = Place(env, episode, torch.zeros_like(episode))
        size = self._class_size
        count = size.shape[0]
        drawn = uniforms(seed, Purpose.KIND, place, count=5 + 2 * count)
        choice, rank, start = split_columns(drawn, (5, count, count))

        def chosen(number: int, choices: Tensor) -> Tensor:
            return choices[(choice[:, number] * choices.shape[0]).long()]

        classes, order = chosen(0, self._classes), rank.argsort(stable=True, dim=1)
        place_of_class = order.argsort(1)
        width = (choice[:, 4] * self._width.shape[0]).long()
        return Kinds(
            classes=classes,
            class_order=order,
            label_noise=chosen(1, self._noise),
            images_per_class=chosen(2, self._images),
            first_image=(start * size).long(),
            width=self._width[width],
            traits=Traits(
                learning_rate=chosen(3, self._learning_rate),
                class_mask=place_of_class < classes.unsqueeze(1),
                channels_used=self._channels_used[width],
            ),
        )

    def batches(self, seed: int, kinds: Kinds, place: Place, *, count: int) -> Batches:
        """Images sampled with replacement, each class of a host as often as another.

        Args:
            seed: Seed of all random numbers.
            kinds: Kinds of the hosts.
            place: Environment, episode and step of each host.
            count: ``N``, the number of images of each host.
        """
        limits = torch.stack((kinds.classes, kinds.images_per_class), dim=1)
        high = limits.repeat_interleave(count, dim=1)
        drawn = integers(seed, Purpose.BATCHES, place, count=2 * count, high=high)
        pick, position = drawn[:, :count], drawn[:, count:]
        true = kinds.class_order.gather(1, pick)
        # The images of a host are neighbours in the order of the class, of which the last and the
        # first are neighbours.
        position = (kinds.first_image.gather(1, true) + position) % self._class_size[true]
        image = self._order[self._class_start[true] + position]
        episode = place._replace(step=torch.zeros_like(place.step))
        chance, other, _, _ = words_at(seed, Purpose.LABELS, episode, image)
        classes = kinds.classes.unsqueeze(1)
        wrong = (pick + 1 + (other * (classes - 1) >> 32)) % classes
        is_wrong = chance * 2.0**-32 < kinds.label_noise.unsqueeze(1)
        label = torch.where(is_wrong, kinds.class_order.gather(1, wrong), true)
        return Batches(image, label)
