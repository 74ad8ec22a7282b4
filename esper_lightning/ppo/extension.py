"""Extensions of PPO: rewards, terms of the loss and metrics that are added to those of PPO.

Axes: ``T`` step, ``B`` environment, ``M`` sample. ``PPO(extensions=...)`` takes the spec of
each extension. A reward of an extension is added before the advantages are estimated, and a term of
the loss is added to the loss of every minibatch. An extension replaces nothing of PPO.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from esper_lightning.core.errors import Words, require
from esper_lightning.core.ranks import Ranks
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import map_tree, named_tensors
from esper_lightning.core.types import LossTerms, Rollout, Samples
from esper_lightning.policies.base import Evaluation

__all__ = ["FINITE", "Extension", "ExtensionSpec", "Extensions", "Prepared"]

FINITE = "finite rewards of "
"""Beginning of the name of a metric that says whether all rewards of an extension are finite.

The name of the extension's class follows.
"""
_OWNERS = ("rollout", "loss", "policy", "optim", "env", "eval")  # of PPO's own metrics


class Prepared(NamedTuple):
    """What ``Extension.prepare`` returns of a rollout; each field may be left at its default.

    Attributes:
        reward: Reward of each step, which is added to the environment's after that is scaled.
        kept: Tensors ``[T, B, ...]`` of what ``losses`` needs of each step, in tuples or dicts.
            ``losses`` gets the rows of its minibatch. A number that changes from rollout to rollout
            belongs in a tensor or a buffer: with each new number, the update is compiled again.
        metrics: Metrics of the rollout by their names ``<owner>/<name>``, such as ``rnd/reward``.
            The history has the means over ranks.
    """

    reward: Float[Tensor, "T B"] | None = None
    kept: Any = None
    metrics: Mapping[str, Float[Tensor, ""]] = {}


class Extension(nn.Module):
    """A module that adds rewards, terms of the loss or metrics to PPO.

    A subclass overrides ``prepare``, ``losses`` or both. Between two calls of ``losses`` only
    buffers and parameters may change, parameters in place alone: compiled code on CUDA reads other
    attributes, and numbers in ``kept``, once, and on a CPU the update runs eagerly once another
    attribute has changed. A buffer that ``prepare`` replaces is used as well.

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
        """Reward the steps of a rollout and update statistics, before advantages are estimated.

        The method is called once in each iteration, eagerly and without gradients. Statistics may
        be updated here, and nowhere else.

        Args:
            rollout: Steps of this rank, with observations as the environment gives them, and with
                ``reached_obs`` of every step, images too. Later rollouts overwrite these tensors,
                at the next iteration or the one after: what an extension keeps is a ``clone``.
            healthy: Whether the rollouts of all ranks are finite. Where False, statistics must stay
                as they are.
            ranks: Ranks over which statistics are merged.
            generator: Random stream of this rank on the device; its state is in the checkpoint.

        Returns:
            Reward, tensors for ``losses``, and metrics. The default adds nothing.
        """
        del rollout, healthy, ranks, generator
        return Prepared()

    def losses(
        self, batch: Samples, kept: Any, evaluate: Callable[[Samples], Evaluation]
    ) -> dict[str, Float[Tensor, " M"]]:
        """Terms that are added to the loss of a minibatch, and averaged over its samples.

        A pure function, so that it can be compiled: nothing random, no branch on a tensor, and no
        buffer changes. A weight that a callback changes must be a buffer. The term of a sample must
        not depend on other samples, as it would through a mean over the minibatch, because a
        minibatch may be cut into chunks. The history has the mean of each term as ``loss/<name>``.

        Args:
            batch: Samples of the minibatch, with observations as the policy sees them.
            kept: Rows ``[M, ...]`` of what ``prepare`` kept.
            evaluate: Function that evaluates samples under the current weights, with gradients.

        Returns:
            One number for each sample and term, by the name of the term, already weighted.
        """
        del batch, kept, evaluate
        return {}


class ExtensionSpec(ABC):
    """The settings of an extension: data without tensors.

    A frozen dataclass that derives from this class can be named in a config, and is stored in
    checkpoints.
    """

    several: ClassVar[bool] = False
    """Whether a run may have several extensions of this class, with different settings.

    The names of their metrics and terms must then depend on the settings.
    """

    @abstractmethod
    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Extension:
        """Build the extension on the CPU.

        Args:
            spaces: Observations and actions of the environment, before any normalisation.
            generator: Source of the initial weights, and the only one.

        Raises:
            ValueError: If the extension does not fit these spaces.
        """


class Extensions(nn.ModuleList):
    """All extensions of a run, in the order of ``PPO(extensions=...)``."""

    @classmethod
    def build(
        cls, specs: Iterable[ExtensionSpec], spaces: EnvSpaces, generator: torch.Generator
    ) -> Self:
        """Build the extension of each spec, on the CPU.

        Args:
            specs: Specs of the extensions.
            spaces: Observations and actions of the environment, before any normalisation.
            generator: Source of the initial weights, for one extension after the other.

        Raises:
            ValueError: If a spec built something else than an extension, or an extension that adds
                nothing to PPO.
        """
        built = [
            (f"{type(spec).__name__}.build()", spec.build(spaces, generator)) for spec in specs
        ]
        for field, one in built:
            kind: Any = type(one)
            require(isinstance(one, Extension), field, "return an Extension", Words(kind.__name__))
            both = (kind.prepare, kind.losses)
            adds = both != (Extension.prepare, Extension.losses)
            rule = "return an extension that overrides prepare or losses"
            require(adds, field, rule, Words(kind.__name__))
        return cls(one for _, one in built)

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
        """Call ``prepare`` of each extension, and join the results.

        Args:
            rollout: Steps of this rank, with ``reached_obs`` of every step.
            healthy: Whether the rollouts of all ranks are finite.
            ranks: Ranks over which metrics are averaged, and statistics merged.
            generator: Random stream of this rank on the device.

        Returns:
            The sum of the rewards, what each extension keeps as rows ``[T * B, ...]``, and all
            metrics averaged over ranks.

        Raises:
            ValueError: If something that an extension returned has another type, shape or name
                than ``Prepared`` says.
        """
        reward: Tensor | None = None
        kept: list[Any] = []
        metrics: dict[str, Tensor] = {}
        for extension in self:
            one = extension.prepare(rollout, healthy=healthy, ranks=ranks, generator=generator)
            _check_prepared(one, rollout, f"{type(extension).__name__}.prepare()")
            if one.reward is not None:
                finite, key = one.reward.isfinite().all(), FINITE + type(extension).__name__
                metrics[key] = finite & metrics.get(key, finite)
                reward = one.reward if reward is None else reward + one.reward
            kept.append(map_tree(lambda tensor: tensor.flatten(0, 1), one.kept))
            _merge(metrics, one.metrics, f"{type(extension).__name__}.prepare().metrics")
        if metrics:
            total = ranks.sum(torch.stack([metric.float() for metric in metrics.values()]))
            metrics = dict(zip(metrics, (total / ranks.size).unbind(), strict=True))
        return Prepared(reward, tuple(kept), metrics)

    def losses(
        self, batch: Samples, evaluate: Callable[[Samples], Evaluation]
    ) -> dict[str, Float[Tensor, " M"]]:
        """Call ``losses`` of each extension, and join the terms by their names.

        Args:
            batch: Samples of the minibatch, with what ``prepare`` kept of each of them.
            evaluate: Function that evaluates samples under the current weights, with gradients.

        Raises:
            ValueError: If a term has another shape than ``[M]``, or a name that is taken.
        """
        terms: dict[str, Tensor] = {}
        for extension, kept in zip(self, batch.kept or (), strict=True):
            new = extension.losses(batch, kept, evaluate)
            field, shape = f"{type(extension).__name__}.losses()", [*batch.log_prob.shape]
            for name, term in new.items():
                got = [*term.shape]
                require(got == shape, f"{field}[{name!r}]", f"have shape [M] = {shape}", got)
                free = name not in LossTerms._fields
                require(free, field, f"return other names than {LossTerms._fields}", name)
            _merge(terms, new, field)
        return terms


def _check_prepared(one: object, rollout: Rollout, field: str) -> None:
    """Check the types, shapes and names of what an extension returned.

    Raises:
        ValueError: If something has another type, shape or name than ``Prepared`` says.
    """
    require(isinstance(one, Prepared), field, "return a Prepared", Words(type(one).__name__))
    assert isinstance(one, Prepared)
    shape = [*rollout.reward.shape]
    if one.reward is not None:
        got = [*one.reward.shape]
        require(got == shape, f"{field}.reward", f"have shape [T, B] = {shape}", got)
    for name, tensor in named_tensors(one.kept):
        got, rule = [*tensor.shape], f"begin with [T, B] = {shape}"
        require(got[:2] == shape, f"{field}.kept{name}", rule, got)
    for name, metric in one.metrics.items():
        place, owner = f"{field}.metrics", name.partition("/")[0]
        rule = f"have names <owner>/<name>, with another owner than {', '.join(_OWNERS)}"
        require("/" in name and owner not in _OWNERS, place, rule, name)
        is_scalar = isinstance(metric, Tensor) and metric.dim() == 0  # pyright: ignore[reportUnnecessaryIsInstance]
        require(is_scalar, f"{place}[{name!r}]", "be a scalar tensor", metric)


def _merge(known: dict[str, Tensor], new: Mapping[str, Tensor], field: str) -> None:
    taken = sorted(known.keys() & new.keys())
    hint = "Two extensions of one class need names that depend on their settings."
    require(not taken, field, "have names that no other extension has", taken, hint)
    known.update(new)
