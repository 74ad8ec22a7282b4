"""An entropy bonus that decays: much exploration at the start of a run, none at its end.

Axes: ``M`` sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from typing_extensions import override

from esper_lightning.core.errors import at_least, check_fields, positive
from esper_lightning.core.ranks import Ranks
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.types import Rollout, Samples
from esper_lightning.policies.base import Evaluation
from esper_lightning.ppo.extension import Extension, ExtensionSpec, Prepared
from esper_lightning.ppo.objective import weighted

__all__ = ["DecayingEntropy", "EntropyDecay"]


@dataclass(frozen=True, kw_only=True)
class EntropyDecay(ExtensionSpec):
    """An entropy bonus that falls in a straight line to zero, on top of ``PPOConfig.entropy_coef``.

    A bonus that is large enough to try every choice at the start keeps a policy from ever making up
    its mind, and a bonus that is small from the start lets it settle for what it tried first.

    Attributes:
        coefficient: Weight of the bonus in the loss of the first iteration.
        iterations: Number of iterations after which the weight is zero.
    """

    coefficient: float = 0.05
    iterations: int = 100

    def __post_init__(self) -> None:
        check_fields(self)
        positive("EntropyDecay.coefficient", self.coefficient)
        at_least("EntropyDecay.iterations", self.iterations, 1)

    def build(self, spaces: EnvSpaces, generator: Generator) -> "DecayingEntropy":
        """Allocate on the CPU; nothing is random."""
        del spaces, generator
        return DecayingEntropy(self)


class DecayingEntropy(Extension):
    """The number of iterations so far, and the weight of the bonus in the present one."""

    iteration: Tensor
    weight: Tensor

    def __init__(self, spec: EntropyDecay) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("iteration", torch.zeros(()))
        self.register_buffer("weight", torch.full((), spec.coefficient))

    @override
    def prepare(
        self, rollout: Rollout, *, healthy: Bool[Tensor, ""], ranks: Ranks, generator: Generator
    ) -> Prepared:
        """Lower the weight of the bonus."""
        del rollout, healthy, ranks, generator
        left = (1.0 - self.iteration / self.spec.iterations).clamp(min=0.0)
        self.weight.copy_(self.spec.coefficient * left)
        self.iteration.add_(1.0)
        return Prepared(metrics={"entropy_decay/weight": self.weight.clone()})

    @override
    def losses(
        self, batch: Samples, kept: Any, evaluate: Callable[[Samples], Evaluation]
    ) -> dict[str, Float[Tensor, " M"]]:
        """Less entropy is a loss."""
        del kept
        return {"entropy_decay": -self.weight * weighted(evaluate(batch).entropy, batch)}
