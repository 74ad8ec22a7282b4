"""The settings of ``Morphogenesis``, whose defaults are the preset ``digits``."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch

from esper_lightning.core.errors import at_least, check_fields, positive, require
from esper_lightning.core.spaces import Box, EnvSpaces
from esper_lightning.envs.base import EnvSpec
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS
from esper_lightning.envs.morphogenesis.data import (
    CIFAR_HINT,
    IMAGE,
    Dataset,
    Split,
    Splits,
    load,
)
from esper_lightning.envs.morphogenesis.env import MorphogenesisEnv
from esper_lightning.envs.morphogenesis.host import Architecture
from esper_lightning.envs.morphogenesis.lifecycle import LifeCycle, RampShape
from esper_lightning.envs.morphogenesis.observation import action_space, feature_names
from esper_lightning.envs.morphogenesis.population import (
    CIFAR_HELD_OUT,
    CIFAR_KINDS,
    DIGITS_HELD_OUT,
    DIGITS_KINDS,
    Population,
)
from esper_lightning.envs.morphogenesis.reward import RewardWeights
from esper_lightning.envs.morphogenesis.state import HostInitializer
from esper_lightning.envs.morphogenesis.trainer import HostTrainer
from esper_lightning.envs.morphogenesis.training import SGD

__all__ = ["Morphogenesis"]


@dataclass(frozen=True, kw_only=True)
class Morphogenesis(EnvSpec):
    """Small networks under training, which the agent decides how to grow.

    Each environment trains a *host* from scratch by SGD, one epoch a step. The agent may germinate
    a *seed*, a small residual module, in a slot after any block. The seed trains there without
    being part of the network until the agent blends it in, fossilizes it (makes it permanent) or
    prunes it. The reward is the accuracy gained on a validation split, less rent for grown
    parameters.

    Actions are ``FactoredDiscrete`` with heads ``op``, ``slot`` (given ``op``), ``blueprint`` and
    ``ramp``, which ``lifecycle`` explains. Observations are vectors, and ``feature_names`` names
    their entries. An episode terminates after ``epochs`` steps, or when a loss is not finite.

    Attributes:
        num_envs: Hosts on each rank. A host is the same bits whatever hosts are beside it. By
            operations of torch, a host that is alone rounds differently.
        dataset: ``digits`` (scikit-learn's, 8x8 images), ``cifar10`` or ``synthetic``.
        folder: Folder that holds ``cifar-10-batches-py`` or its archive, for ``cifar10``.
        image: Channels and side of ``synthetic`` images; the other data sets have their own.
        classes: Number of classes of ``synthetic`` images.
        noise: Standard deviation of the noise that is added once to every image, in units of the
            images' standard deviation.
        channels: Channels of each block of the host; a slot follows each block.
        kernels: Side of each block's convolution, odd.
        pools: Factor by which each block reduces the side.
        epochs: Steps of an episode.
        train_batches: SGD updates in a step.
        batch_size: Images in an update, sampled with replacement.
        validation_size: Number of images on which accuracy is measured, the first ones of the
            validation split.
        learning_rate: Learning rate of SGD for hosts and seeds.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty of every parameter.
        max_grad_norm: Norm to which gradients of a host are clipped.
        blueprints: Names of the modules that can be grown.
        ramp_epochs: Durations of blending that the agent can choose, in epochs.
        ramp_shape: Shape of the rise of alpha: ``linear``, ``cosine`` or ``sigmoid``.
        min_training_epochs: Epochs in isolation before a seed may be blended.
        min_dormant_epochs: Epochs for which a slot is empty before a seed may germinate; at the
            start of an episode, the epochs in which a host can only be watched.
        fade_epochs: Epochs in which a pruned seed that is attached fades out.
        cooldown_epochs: Epochs for which a slot stays empty after its seed was pruned.
        gain_weight: Reward for accuracy from 0 to 1.
        rent_weight: Cost in each step of as many grown parameters as the host has.
        intervention_cost: Cost of each op except WAIT.
        divergence_penalty: Reward of the step in which a host diverges.
        shaping_weight: Weight of potential-based shaping on stages; 0 is off.
        shaping_discount: Discount of the shaping, which should be that of the learner.
        compiled: On a CPU, whether hosts are trained by native code, which a C++ compiler makes
            once; ``None`` for whether there is a compiler. On CUDA, whether Inductor compiles
            updates of the hosts, once for each number of environments; ``None`` for no. That takes
            a minute or more, and a step then launches less than half as many kernels
            (``docs/gpu.md``).
        population: Choices for what each host is like; ``None`` for hosts that are all alike. A
            population has learning rates of its own.
        hide_training: Whether observations hide what is measured in the training of a host, so that
            a policy can follow a schedule, but cannot react.
    """

    num_envs: int = 64
    dataset: Dataset = "digits"
    folder: str | None = None
    image: tuple[int, ...] = (1, 8)
    classes: int = 10
    noise: float = 0.0
    channels: tuple[int, ...] = (4, 16, 16)
    kernels: tuple[int, ...] = (3, 1, 1)
    pools: tuple[int, ...] = (4, 1, 1)
    epochs: int = 20
    train_batches: int = 8
    batch_size: int = 32
    validation_size: int = 256
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_grad_norm: float = 1.0
    blueprints: tuple[str, ...] = BLUEPRINTS
    ramp_epochs: tuple[int, ...] = (1, 2, 4)
    ramp_shape: RampShape = "linear"
    min_training_epochs: int = 1
    min_dormant_epochs: int = 0
    fade_epochs: int = 1
    cooldown_epochs: int = 1
    gain_weight: float = 10.0
    rent_weight: float = 0.005
    intervention_cost: float = 0.01
    divergence_penalty: float = -5.0
    shaping_weight: float = 0.0
    shaping_discount: float = 0.99
    compiled: bool | None = None
    population: Population | None = None
    hide_training: bool = False

    def __post_init__(self) -> None:
        sizes = ("channels", "kernels", "pools", "ramp_epochs", "image")
        rules: dict[str, str] = dict.fromkeys(sizes, "be a tuple of integers of at least 1")
        rules["blueprints"] = f"be different names of {BLUEPRINTS}"
        check_fields(self, rules)
        least = {"cooldown_epochs": 0, "min_dormant_epochs": 0, "classes": 2}
        for name in (
            "num_envs",
            "cooldown_epochs",
            "classes",
            "epochs",
            "train_batches",
            "batch_size",
            "validation_size",
            "min_training_epochs",
            "min_dormant_epochs",
            "fade_epochs",
        ):
            at_least(f"Morphogenesis.{name}", getattr(self, name), least.get(name, 1))
        ok = self.dataset != "cifar10" or self.folder is not None
        rule = "be given for 'cifar10'"
        require(ok, "Morphogenesis.folder", rule, self.folder, CIFAR_HINT)
        for name in sizes:
            values = getattr(self, name)
            _require(name, len(values) >= 1 and min(values) >= 1, rules[name], values)
        _require("image", len(self.image) == 2, "be channels and side", self.image)
        self._refuse_foreign_data()
        if self.population is not None:
            most, rule = max(self.population.classes), f"be at most classes = {self.classes}"
            require(most <= self.classes, "Population.classes", rule, self.population.classes)
        _require("channels", min(self.channels) >= 4, "be at least 4", self.channels)
        for name in ("kernels", "pools"):
            ok = len(getattr(self, name)) == len(self.channels)
            rule = f"have an entry for each of {len(self.channels)} blocks"
            _require(name, ok, rule, getattr(self, name))
        odd = all(side % 2 == 1 for side in self.kernels)
        _require("kernels", odd, "be odd", self.kernels)
        architecture, side = self.architecture(), self.architecture().image[1]
        for pool in self.pools:
            side //= pool
        _require("pools", side >= 1, f"leave something of {architecture.image[1]}", self.pools)
        ok = len(self.blueprints) >= 1 and all(name in BLUEPRINTS for name in self.blueprints)
        ok = ok and len(set(self.blueprints)) == len(self.blueprints)
        _require("blueprints", ok, rules["blueprints"], self.blueprints)
        for name in ("momentum", "gain_weight", "divergence_penalty", "shaping_discount"):
            value = getattr(self, name)
            _require(name, math.isfinite(value), "be a finite number", value)
        for name in ("learning_rate", "max_grad_norm"):
            positive(f"Morphogenesis.{name}", getattr(self, name))
        for name in ("noise", "weight_decay", "rent_weight", "intervention_cost", "shaping_weight"):
            at_least(f"Morphogenesis.{name}", getattr(self, name), 0)
        _require("momentum", 0 <= self.momentum < 1, "lie in [0, 1)", self.momentum)
        ok = 0 < self.shaping_discount <= 1
        _require("shaping_discount", ok, "lie in (0, 1]", self.shaping_discount)

    def _refuse_foreign_data(self) -> None:
        """Refuse an ``image`` or ``classes`` of another data set than ``synthetic``."""
        if self.dataset == "synthetic":
            return
        own = IMAGE[self.dataset]
        ok = tuple(self.image) in (own, Morphogenesis.image)
        hint = "Only 'synthetic' has a choice."
        rule = f"be {own} for {self.dataset!r}"
        require(ok, "Morphogenesis.image", rule, self.image, hint)
        rule = f"be 10 for {self.dataset!r}"
        require(self.classes == 10, "Morphogenesis.classes", rule, self.classes, hint)

    @classmethod
    def digits(cls, **changes: Any) -> "Morphogenesis":
        """The defaults: real images that need no download, and hosts that train fast."""
        return cls(**changes)

    @classmethod
    def cifar10(cls, folder: str, **changes: Any) -> "Morphogenesis":
        """CIFAR-10 and a host of 6,418 parameters, which is too small for this data."""
        data: dict[str, Any] = {"dataset": "cifar10", "folder": folder}
        return cls(**_LARGE | data | changes)

    @classmethod
    def digits_mixed(cls, *, held_out: bool = False, **changes: Any) -> "Morphogenesis":
        """Digits, and hosts that differ in what they need: some need nothing, others need much.

        ``held_out`` hosts are of kinds that are in no training: numbers of classes and shares of
        wrong labels between those of training, and beyond them.
        """
        given = dict(_MIXED)
        given["population"] = DIGITS_HELD_OUT if held_out else DIGITS_KINDS
        return cls(**given | changes)

    @classmethod
    def cifar10_mixed(
        cls, folder: str, *, held_out: bool = False, **changes: Any
    ) -> "Morphogenesis":
        """CIFAR-10, and hosts that differ in what they need, or are of kinds held out."""
        given: dict[str, Any] = {"intervention_cost": 0.1}
        given["population"] = CIFAR_HELD_OUT if held_out else CIFAR_KINDS
        return cls.cifar10(folder, **given | changes)

    @classmethod
    def synthetic(cls, **changes: Any) -> "Morphogenesis":
        """Templates under noise, for tests and benchmarks."""
        return cls(**_SYNTHETIC | changes)

    @classmethod
    def benchmark(cls, **changes: Any) -> "Morphogenesis":
        """The shapes of ``cifar10`` without its data."""
        return cls(**_LARGE | changes)

    def architecture(self) -> Architecture:
        """The layers of the host."""
        image = cast(tuple[int, int], IMAGE.get(self.dataset, self.image))
        return Architecture(image, self.channels, self.kernels, self.pools, self.classes)

    def sgd(self) -> SGD:
        """The settings of SGD, which trains the hosts."""
        return SGD(
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )

    def reward_weights(self) -> RewardWeights:
        """The weights of the terms of the reward."""
        return RewardWeights(
            gain=self.gain_weight,
            rent=self.rent_weight,
            intervention=self.intervention_cost,
            divergence=self.divergence_penalty,
            shaping=self.shaping_weight,
            shaping_discount=self.shaping_discount,
        )

    def spaces(self) -> EnvSpaces:
        """Spaces of observations, a vector, and of actions, four choices under a mask."""
        slots = len(self.channels)
        action = action_space(slots, len(self.blueprints), len(self.ramp_epochs))
        return EnvSpaces(obs=Box((len(feature_names(slots)),)), action=action, masked=True)

    def splits(self, device: torch.device) -> Splits:
        """The data, read once: training split, the used images of the validation split, test split.

        Raises:
            ValueError: If the data is absent, is broken, or is less than the settings ask for.
        """
        architecture = self.architecture()
        splits = load(
            self.dataset,
            folder=self.folder,
            image=architecture.image,
            classes=architecture.classes,
            noise=self.noise,
            device=device,
        )
        most = splits.validation.label.shape[0]
        rule = f"be at most {most} for {self.dataset!r}"
        _require("validation_size", self.validation_size <= most, rule, self.validation_size)
        few = Split(*(tensor[: self.validation_size] for tensor in splits.validation))
        splits = splits._replace(validation=few)
        if self.population is not None:
            self._check_population(self.population, splits)
        return splits

    def _check_population(self, population: Population, splits: Splits) -> None:
        """Refuse a population for which there are too few images."""
        training, *others = (int(s.label.bincount(minlength=self.classes).min()) for s in splits)
        rule = f"be at most {training}, the training images of the smallest class"
        got = population.images_per_class
        require(max(got) <= training, "Population.images_per_class", rule, got)
        rule = "leave images of every class for a population"
        _require("validation_size", min(others) > 0, rule, self.validation_size)

    def check_data(self, device: torch.device) -> None:
        """Refuse data that is absent, is broken, or is less than the settings ask for.

        Raises:
            ValueError: If the data is refused; the error names the setting.
        """
        self.splits(device)

    def build(
        self,
        device: torch.device,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        static: bool | None = None,
    ) -> MorphogenesisEnv:
        """Read the data and allocate the hosts.

        Args:
            device: Device of the hosts.
            seed: Seed of all random numbers, at least 0 and less than 2**32.
            dtype: Dtype of the hosts.
            static: Whether every computation runs for every host; ``None`` for whether reading
                which hosts need it would wait for the device.

        Raises:
            ValueError: If the seed is out of range, if the data is absent, is broken, or is less
                than the settings ask for, or if ``compiled`` is True without a C++ compiler.
        """
        ok = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32
        require(ok, "Morphogenesis.build().seed", "be an integer in [0, 2**32)", seed)
        architecture, blueprints = self.architecture(), self.blueprints
        splits = (Split(image.to(dtype), label) for image, label in self.splits(device))
        lifecycle = LifeCycle(
            ramp_choices=self.ramp_epochs,
            ramp_shape=self.ramp_shape,
            min_training_epochs=self.min_training_epochs,
            min_dormant_epochs=self.min_dormant_epochs,
            fade_epochs=self.fade_epochs,
            cooldown_epochs=self.cooldown_epochs,
            device=device,
        )
        trainer = HostTrainer(
            architecture,
            blueprints,
            self.sgd(),
            Splits(*splits),
            train_batches=self.train_batches,
            batch_size=self.batch_size,
            static=device.type != "cpu" if static is None else static,
            compiled=self.compiled,
            population=self.population,
        )
        return MorphogenesisEnv(
            num_envs=self.num_envs,
            epochs=self.epochs,
            spaces=self.spaces(),
            reward_weights=self.reward_weights(),
            lifecycle=lifecycle,
            initializer=HostInitializer(architecture, blueprints, device=device, dtype=dtype),
            trainer=trainer,
            device=device,
            seed=seed,
            hide_training=self.hide_training,
        )


def _require(name: str, ok: bool, rule: str, got: object) -> None:
    require(ok, f"Morphogenesis.{name}", rule, got)


_SYNTHETIC: dict[str, Any] = {"dataset": "synthetic"}
_LARGE: dict[str, Any] = {
    "dataset": "synthetic",
    "image": (3, 32),
    "channels": (8, 16, 32),
    "kernels": (3, 3, 3),
    "pools": (2, 2, 2),
    "epochs": 60,
    "batch_size": 64,
    "validation_size": 256,
    "learning_rate": 0.1,
}
_MIXED: dict[str, Any] = {
    "channels": (4, 8, 8),
    "pools": (2, 1, 2),
    "epochs": 12,
    "train_batches": 16,
    "min_dormant_epochs": 2,
    "rent_weight": 0.015,
    "intervention_cost": 0.1,
    "validation_size": 400,
}
