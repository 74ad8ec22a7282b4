"""What can be added to PPO: rewards, terms of the loss and metrics, by extensions.

Axes: ``T`` step, ``B`` environment, ``M`` sample. A reward reaches the advantages, a term of the
loss reaches every minibatch; rollouts, advantages and gradient steps stay those of PPO.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from esper_lightning.core.errors import require
from esper_lightning.core.ranks import Ranks
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import map_tree
from esper_lightning.core.types import Rollout, Samples
from esper_lightning.policies.base import Evaluation

__all__ = ["Extension", "ExtensionSpec", "Extensions", "Prepared"]


class Prepared(NamedTuple):
    """What an extension makes of a rollout before the advantages; everything is optional."""

    reward: Float[Tensor, "T B"] | None = None  # added to the rewards, after their scaling
    kept: Any = None  # tensors [T, B, ...] in tuples or dicts, of which ``losses`` gets the rows
    metrics: Mapping[str, Float[Tensor, ""]] = {}  # columns of the history, averaged over ranks


class Extension(nn.Module):
    """Something that is added to PPO. Override one of the two methods, or both.

    Parameters that require a gradient are trained by PPO's optimizer, together with the policy.
    Parameters and buffers are in the checkpoint and must be the same on all ranks: gradients are
    summed over ranks by PPO, statistics must be merged over ``ranks`` by the extension.
    """

    def prepare(
        self,
        rollout: Rollout,
        *,
        healthy: Bool[Tensor, ""],
        ranks: Ranks,
        generator: torch.Generator,
    ) -> Prepared:
        """Take in a rollout before its advantages are estimated; runs eagerly, without gradients.

        Statistics may be updated here, and only here.

        Args:
            rollout: Steps of this rank, with observations as the environment gives them.
            healthy: Whether the rollouts of all ranks are finite. Where False, statistics must stay
                as they are.
            ranks: Ranks over which statistics are merged.
            generator: Random stream of this rank on the device; its state is in the checkpoint.
        """
        del rollout, healthy, ranks, generator
        return Prepared()

    def losses(
        self, batch: Samples, kept: Any, evaluate: Callable[[Samples], Evaluation]
    ) -> dict[str, Float[Tensor, " M"]]:
        """Terms that are added to the loss of a minibatch, and averaged over its samples.

        A pure function, so that it can be compiled: nothing random, no branch on a tensor, and no
        buffer changes. The history has the mean of each term as ``loss/<name>``.

        Args:
            batch: Samples of the minibatch, with observations as the policy sees them.
            kept: Rows ``[M, ...]`` of what ``prepare`` kept.
            evaluate: What the current policy says of samples, with gradients: ``Agent.evaluate``.

        Returns:
            The terms by name, already weighted.
        """
        del batch, kept, evaluate
        return {}


class ExtensionSpec(ABC):
    """Which extension to build: data without tensors. Derive a frozen dataclass from it."""

    @abstractmethod
    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Extension:
        """Allocate and initialise on the CPU, drawing from ``generator`` only.

        Args:
            spaces: Observations and actions of the environment, before any normalisation.
            generator: Source of the initial weights.

        Raises:
            ValueError: If the extension cannot serve these spaces.
        """


class Extensions(nn.ModuleList):
    """All extensions of a run, in their order."""

    @override
    def __iter__(self) -> Iterator[Extension]:
        return cast(Iterator[Extension], super().__iter__())

    @torch.no_grad()
    def prepare(
        self,
        rollout: Rollout,
        *,
        healthy: Bool[Tensor, ""],
        ranks: Ranks,
        generator: torch.Generator,
    ) -> Prepared:
        """Take in a rollout: see ``Extension.prepare``.

        Returns:
            The sum of the rewards, what each extension keeps as rows ``[T * B, ...]``, and all
            metrics averaged over ranks.

        Raises:
            ValueError: If a reward has another shape, or two metrics have one name.
        """
        reward: Tensor | None = None
        kept: list[Any] = []
        metrics: dict[str, Tensor] = {}
        for extension in self:
            one = extension.prepare(rollout, healthy=healthy, ranks=ranks, generator=generator)
            if one.reward is not None:
                field, shape = f"{type(extension).__name__}.prepare().reward", rollout.reward.shape
                rule, got = f"have shape [T, B] = {[*shape]}", one.reward.shape
                require(got == shape, field, rule, [*got])
                reward = one.reward if reward is None else reward + one.reward
            kept.append(map_tree(lambda tensor: tensor.flatten(0, 1), one.kept))
            _merge(metrics, one.metrics, extension)
        if metrics:
            total = ranks.sum(torch.stack([metric.float() for metric in metrics.values()]))
            metrics = dict(zip(metrics, (total / ranks.size).unbind(), strict=True))
        return Prepared(reward, tuple(kept), metrics)

    def losses(
        self, batch: Samples, evaluate: Callable[[Samples], Evaluation]
    ) -> dict[str, Float[Tensor, " M"]]:
        """Terms of the loss of all extensions: see ``Extension.losses``.

        Raises:
            ValueError: If two terms have one name.
        """
        terms: dict[str, Tensor] = {}
        for extension, kept in zip(self, batch.kept or (), strict=True):
            _merge(terms, extension.losses(batch, kept, evaluate), extension)
        return terms


def _merge(known: dict[str, Tensor], new: Mapping[str, Tensor], extension: Extension) -> None:
    taken = sorted(known.keys() & new.keys())
    rule = "return names that no other extension returns"
    require(not taken, type(extension).__name__, rule, taken)
    known.update(new)
