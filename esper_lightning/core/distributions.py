"""Action distributions as thin immutable objects over tensors.

Axes: ``M`` sample, ``A`` component, ``K`` choice.

Each distribution is built from a network's output in float32 (also under autocast). Its samples are
functions of noise that was sampled before, so that acting is a pure function. A sample may differ
from the action that the environment is given, as with ``TanhGaussian``.
"""

import math
from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from esper_lightning.core.constants import made_to_keep
from esper_lightning.core.shapes import Bool, Float, Int, Shaped
from esper_lightning.core.spaces import (
    ActionSpace,
    Discrete,
    FactoredDiscrete,
    Head,
    MultiDiscrete,
    mask_parts,
)

__all__ = [
    "Categorical",
    "ConditionedCategorical",
    "DiagonalGaussian",
    "Distribution",
    "FactoredCategorical",
    "TanhGaussian",
    "allows_choice",
    "has_choice",
]

_HALF_LOG_TAU = 0.5 * math.log(2.0 * math.pi)


@runtime_checkable
class Distribution(Protocol):
    """The methods that acting and the update need of a distribution over ``M`` actions."""

    def sample(self, noise: Float[Tensor, "M N"]) -> Shaped[Tensor, "M *A"]:
        """One action for each row, from noise of the kind that the class documents."""
        ...

    def mode(self) -> Shaped[Tensor, "M *A"]:
        """The most probable action of each row."""
        ...

    def log_prob(self, action: Shaped[Tensor, "M *A"]) -> Float[Tensor, " M"]:
        """Log-probability (density) of actions that ``sample`` or ``mode`` returned."""
        ...

    def entropy(self) -> Float[Tensor, " M"]:
        """Entropy in nats (differential, for densities)."""
        ...


class Categorical:
    """One choice among ``K``, of which ``mask`` allows some.

    A forbidden choice has probability zero, and neither it nor its logit takes part in
    log-probability, entropy or gradient (Huang and Ontanon 2022). Noise: unit exponential.
    """

    def __init__(
        self, logits: Float[Tensor, "M K"], mask: Bool[Tensor, "M K"] | None = None
    ) -> None:
        logits = logits.float()
        if mask is not None:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        self._log_p = logits.log_softmax(-1)
        self._mask = mask

    def sample(self, noise: Float[Tensor, "M K"]) -> Int[Tensor, " M"]:
        """Sample by the Gumbel-max trick: the choice whose exponential clock rings first."""
        return (self._log_p - noise.log()).argmax(-1)

    def mode(self) -> Int[Tensor, " M"]:
        """The most probable choice; the first of equals."""
        return self._log_p.argmax(-1)

    def log_prob(self, action: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
        """Log-probability of the choice."""
        return self._log_p.gather(-1, action[:, None])[:, 0]

    def probability(self) -> Float[Tensor, "M K"]:
        """Probability of each choice."""
        return self._log_p.exp()

    def entropy(self) -> Float[Tensor, " M"]:
        """Entropy over the allowed choices."""
        surprise = self._log_p.exp() * self._log_p
        if self._mask is not None:
            surprise = surprise.masked_fill(~self._mask, 0.0)
        return -surprise.sum(-1)


class FactoredCategorical:
    """``A`` independent choices, one for each component of the action.

    ``logits``, ``mask`` and noise (unit exponential) hold the choices of all components one after
    another.
    """

    def __init__(
        self,
        logits: Float[Tensor, "M K"],
        nvec: tuple[int, ...],
        mask: Bool[Tensor, "M K"] | None = None,
    ) -> None:
        self._sizes = sizes = list(nvec)
        parts = cast(tuple[Tensor, ...], logits.split(sizes, -1))
        masks: Sequence[Tensor | None] = [None] * len(sizes)
        if mask is not None:
            masks = cast(tuple[Tensor, ...], mask.split(sizes, -1))
        self._parts = [
            Categorical(part, allowed) for part, allowed in zip(parts, masks, strict=True)
        ]

    def sample(self, noise: Float[Tensor, "M K"]) -> Int[Tensor, "M A"]:
        """A sample of each component."""
        clocks = cast(tuple[Tensor, ...], noise.split(self._sizes, -1))
        drawn = [part.sample(clock) for part, clock in zip(self._parts, clocks, strict=True)]
        return torch.stack(drawn, -1)

    def mode(self) -> Int[Tensor, "M A"]:
        """The most probable choice of each component."""
        return torch.stack([part.mode() for part in self._parts], -1)

    def log_prob(self, action: Int[Tensor, "M A"]) -> Float[Tensor, " M"]:
        """Log-probability, summed over the components."""
        return torch.stack([part.log_prob(action[:, a]) for a, part in enumerate(self._parts)]).sum(
            0
        )

    def entropy(self) -> Float[Tensor, " M"]:
        """Entropy, summed over the components."""
        return torch.stack([part.entropy() for part in self._parts]).sum(0)


class ConditionedCategorical:
    """The choices of a ``FactoredDiscrete``: the first choice, then the others given the first.

    A conditioned head has logits of its own for each value of the first choice, as it has masks; a
    head that is not conditioned has one set of logits for all values. Logits, mask and noise (unit
    exponential) have the layout that the space gives to masks. A head that the first choice does
    not use contributes nothing to log-probability, entropy or gradient; ``sample`` fills its
    component with one of the allowed choices.
    """

    def __init__(
        self,
        logits: Float[Tensor, "M K"],
        space: FactoredDiscrete,
        mask: Bool[Tensor, "M K"] | None = None,
    ) -> None:
        self._space = space
        first, *others = space.mask_slices
        self._first = Categorical(logits[:, first], None if mask is None else mask[:, first])
        self._others: list[_GivenFirst] = []
        for head, place in zip(space.heads[1:], others, strict=True):
            values = space.heads[0].size if head.conditioned else 1
            own = _table(logits[:, place], values, head.size)
            allowed = None
            if mask is not None:
                allowed = _table(mask[:, place], values, head.size)
                if head.conditioned:  # choices under a forbidden value are forbidden, too
                    allowed = allowed & mask[:, first, None]
            self._others.append(_GivenFirst(own, allowed, place))

    def sample(self, noise: Float[Tensor, "M K"]) -> Int[Tensor, "M A"]:
        """A sample of the first choice, then samples of the others given the first."""
        return self._choose(noise)

    def mode(self) -> Int[Tensor, "M A"]:
        """The most probable first choice, then the most probable others given the first."""
        return self._choose(None)

    def log_prob(self, action: Int[Tensor, "M A"]) -> Float[Tensor, " M"]:
        """Log-probability, summed over the first choice and the heads that it uses."""
        first = action[:, 0]
        terms = [self._first.log_prob(first)]
        for a, (head, other) in enumerate(zip(self._space.heads[1:], self._others, strict=True), 1):
            term = other.given(first).gather(-1, action[:, a, None])[:, 0]
            used = [first == value for value in _values(self._space, head)]
            if used:
                terms.append(torch.where(torch.stack(used).any(0), term, 0.0))
        return torch.stack(terms).sum(0)

    def entropy(self) -> Float[Tensor, " M"]:
        """Entropy of the joint choice.

        The sum of the entropy of the first choice and the mean, over the first choice, of the
        entropy of the heads that the first choice uses.
        """
        probability = self._first.probability().unbind(-1)
        terms = [self._first.entropy()]
        for head, other in zip(self._space.heads[1:], self._others, strict=True):
            entropy = other.entropy().unbind(-1)
            terms += [
                probability[value] * entropy[value if head.conditioned else 0]
                for value in _values(self._space, head)
            ]
        return torch.stack(terms).sum(0)

    def _choose(self, noise: Float[Tensor, "M K"] | None) -> Int[Tensor, "M A"]:
        """Choices sampled with ``noise``, or the most probable choices if ``noise`` is ``None``."""
        place = self._space.mask_slices[0]
        first = self._first.mode() if noise is None else self._first.sample(noise[:, place])
        choices = [first]
        for other in self._others:
            score = other.given(first)
            if noise is not None:
                score = score - other.noise(noise, first).log()
            choices.append(score.argmax(-1))
        return torch.stack(choices, -1)


class _GivenFirst:
    """One choice under each of ``V`` values of the first choice.

    ``V`` is 1 if the distribution of the choice is the same under all values. ``place`` is the
    slice of the choice in logits and noise.
    """

    def __init__(
        self,
        logits: Float[Tensor, "M V K"],
        allowed: Bool[Tensor, "M V K"] | None,
        place: slice,
    ) -> None:
        logits = logits.float()
        if allowed is not None:
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        self._log_p = logits.log_softmax(-1)
        self._allowed, self._place = allowed, place

    def given(self, first: Int[Tensor, " M"]) -> Float[Tensor, "M K"]:
        """Log-probabilities of the choices under the first choice of each row."""
        return _at(self._log_p, first)

    def noise(self, noise: Float[Tensor, "M N"], first: Int[Tensor, " M"]) -> Float[Tensor, "M K"]:
        """The share of the noise that belongs to this choice under the first choice of each row."""
        return _at(_table(noise[:, self._place], *self._log_p.shape[1:]), first)

    def entropy(self) -> Float[Tensor, "M V"]:
        """Entropy over the allowed choices, under each value of the first choice."""
        surprise = self._log_p.exp() * self._log_p
        if self._allowed is not None:
            surprise = surprise.masked_fill(~self._allowed, 0.0)
        return -surprise.sum(-1)


def _values(space: FactoredDiscrete, head: Head) -> Sequence[int]:
    """Values of the first choice under which a head has a meaning."""
    return range(space.heads[0].size) if head.used_by is None else head.used_by


def _table(row: Shaped[Tensor, "M N"], values: int, size: int) -> Shaped[Tensor, "M V K"]:
    return row.reshape(row.shape[0], values, size)


def _at(table: Float[Tensor, "M V K"], first: Int[Tensor, " M"]) -> Float[Tensor, "M K"]:
    if table.shape[1] == 1:
        return table[:, 0]
    chosen = first[:, None, None].expand(-1, 1, table.shape[2])
    return table.gather(1, chosen)[:, 0]


def has_choice(space: ActionSpace, mask: Bool[Tensor, "M K"]) -> Bool[Tensor, " M"]:
    """Whether a mask leaves more than one action to choose from.

    Choices that the only possible first choice does not use do not count.

    Args:
        space: Discrete action space of any kind.
        mask: Masks of the actions.
    """
    if isinstance(space, FactoredDiscrete):
        first, *others = space.mask_slices
        possible = mask[:, first]
        several = [possible.sum(-1) > 1]
        for head, place in zip(space.heads[1:], others, strict=True):
            values = space.heads[0].size if head.conditioned else 1
            among = _table(mask[:, place], values, head.size).sum(-1) > 1  # [M, V]
            several += [
                possible[:, value] & among[:, value if head.conditioned else 0]
                for value in _values(space, head)
            ]
        return torch.stack(several).any(0)
    assert isinstance(space, Discrete | MultiDiscrete)
    nvec = [space.n] if isinstance(space, Discrete) else list(space.nvec)
    parts = cast(tuple[Tensor, ...], mask.split(nvec, -1))
    return torch.stack([part.sum(-1) > 1 for part in parts]).any(0)


def allows_choice(space: ActionSpace, mask: Bool[Tensor, "M K"]) -> Bool[Tensor, "M A"]:
    """Whether each piece of a mask allows a choice; without one, no action would be allowed."""
    parts = cast(tuple[Tensor, ...], mask.split(list(mask_parts(space)), -1))
    return torch.stack([part.any(-1) for part in parts], -1)


class DiagonalGaussian:
    """Independent normal components. Noise: standard normal."""

    def __init__(self, mean: Float[Tensor, "M A"], log_std: Float[Tensor, "M A"]) -> None:
        self._mean, self._log_std = mean.float(), log_std.float()

    def sample(self, noise: Float[Tensor, "M A"]) -> Float[Tensor, "M A"]:
        """A sample of each component."""
        return self._mean + self._log_std.exp() * noise

    def mode(self) -> Float[Tensor, "M A"]:
        """The mean."""
        return self._mean

    def log_prob(self, action: Float[Tensor, "M A"]) -> Float[Tensor, " M"]:
        """Log-density, summed over the components."""
        z = (action - self._mean) * (-self._log_std).exp()
        return (-0.5 * z.square() - self._log_std - _HALF_LOG_TAU).sum(-1)

    def entropy(self) -> Float[Tensor, " M"]:
        """Differential entropy, summed over the components."""
        return (self._log_std + 0.5 + _HALF_LOG_TAU).sum(-1)


class TanhGaussian:
    """A diagonal Gaussian seen through ``tanh``: the density is that of ``tanh(u)`` on (-1, 1).

    An action is stored as ``u``, before ``tanh``: the change of variables then needs no inverse,
    which would be infinite where ``tanh`` saturates. Noise: standard normal.
    """

    def __init__(self, mean: Float[Tensor, "M A"], log_std: Float[Tensor, "M A"]) -> None:
        self._base = DiagonalGaussian(mean, log_std)
        self._mean, self._log_std = mean.float(), log_std.float()

    def sample(self, noise: Float[Tensor, "M A"]) -> Float[Tensor, "M A"]:
        """A sample of ``u``."""
        return self._base.sample(noise)

    def mode(self) -> Float[Tensor, "M A"]:
        """The ``u`` of the mean: the median action."""
        return self._base.mode()

    def log_prob(self, action: Float[Tensor, "M A"]) -> Float[Tensor, " M"]:
        """Log-density of ``tanh(u)``, given ``u``."""
        return self._base.log_prob(action) - log_tanh_slope(action).sum(-1)

    def entropy(self) -> Float[Tensor, " M"]:
        """Differential entropy of ``tanh(u)``.

        The entropy of ``u`` plus the mean log-slope of ``tanh``, by Gauss-Hermite quadrature. The
        mean is that of a smooth function over a Gaussian: 32 nodes are exact to about 1e-4 for
        deviations up to 2.
        """
        node, weight = _hermite_nodes(self._mean.device)
        u = self._mean[..., None] + self._log_std.exp()[..., None] * node  # [M, A] -> [M, A, 32]
        return self._base.entropy() + (log_tanh_slope(u) * weight).sum(
            (-1, -2)
        )  # "@" would be cast down


def log_tanh_slope(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``log(1 - tanh(u)^2)`` without cancellation, also far from zero."""
    return 2.0 * (math.log(2.0) - u - torch.nn.functional.softplus(-2.0 * u))


_HERMITE: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _hermite_nodes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``[32]`` for means over a standard normal; copied to a device once."""
    if device not in _HERMITE:
        import numpy as np  # noqa: PLC0415

        node, weight = np.polynomial.hermite_e.hermegauss(32)
        scaled = weight / math.sqrt(2.0 * math.pi)
        with made_to_keep():
            _HERMITE[device] = (
                torch.tensor(node, dtype=torch.float32, device=device),
                torch.tensor(scaled, dtype=torch.float32, device=device),
            )
    return _HERMITE[device]
