"""Random network distillation (Burda et al. 2018): a reward for observations that are new.

Axes: ``T`` step, ``B`` environment, ``M`` sample, ``F`` feature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from esper_lightning.core.errors import at_least, check_fields, positive, require
from esper_lightning.core.gae import discounted_returns
from esper_lightning.core.ranks import Ranks
from esper_lightning.core.running_stats import Moments, ObsNormalizer, RunningStats
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import map_obs, map_tree
from esper_lightning.core.types import Observation, Rollout, Samples
from esper_lightning.policies.base import Evaluation
from esper_lightning.policies.encoders import FlatEncoder
from esper_lightning.policies.layers import check_layers, orthogonal_linear
from esper_lightning.ppo.extension import Extension, ExtensionSpec, Prepared

__all__ = ["RND", "RandomDistillation"]


@dataclass(frozen=True, kw_only=True)
class RND(ExtensionSpec):
    """Random network distillation (Burda et al. 2018), as ``PPO(extensions=(RND(),))``.

    A network learns to predict the features that a second network of random weights computes from
    each observation that is reached. The squared error, large where little was seen, is an
    additional reward, divided by the running deviation of its discounted sums. Unlike in the paper,
    one value head estimates the sum of both rewards, up to the end of an episode; no random agent
    acts first; and the samples that train the predictor are chosen once for each rollout.

    Attributes:
        coefficient: Weight of the additional reward.
        keep_fraction: Share of the samples that train the predictor, in (0, 1].
        discount: ``gamma`` of the discounted sums that set the scale of the reward, per step.
        hidden_sizes: Width of each hidden layer of both networks.
        features: Number of features ``F`` of both networks.
    """

    coefficient: float = 1.0
    keep_fraction: float = 0.25
    discount: float = 0.99
    hidden_sizes: tuple[int, ...] = (64, 64)
    features: int = 64

    def __post_init__(self) -> None:
        check_fields(self)
        check_layers("RND", self.hidden_sizes)
        positive("RND.coefficient", self.coefficient)
        at_least("RND.features", self.features, 1)
        share, discount = self.keep_fraction, self.discount
        require(0.0 < share <= 1.0, "RND.keep_fraction", "lie in (0, 1]", share)
        require(0.0 <= discount < 1.0, "RND.discount", "lie in [0, 1)", discount)

    def build(self, spaces: EnvSpaces, generator: Generator) -> "RandomDistillation":
        """Allocate and initialise on the CPU; everything random comes from ``generator``."""
        return RandomDistillation(self, spaces, generator)


class RandomDistillation(Extension):
    """A fixed random network, a predictor of it, and the statistics of observations and errors."""

    def __init__(self, spec: RND, spaces: EnvSpaces, generator: Generator) -> None:
        super().__init__()
        self.spec = spec
        self.normalizer = ObsNormalizer(spaces.obs, clip=5.0)  # as in the paper
        self.error_return = RunningStats(())
        sizes = spec.hidden_sizes

        def network() -> nn.Sequential:
            first = FlatEncoder(spaces.obs, None, sizes, activation="relu", generator=generator)
            last = orthogonal_linear(first.features, spec.features, gain=1.0, generator=generator)
            return nn.Sequential(first, last)

        self.target, self.predictor = network().requires_grad_(False), network()

    @override
    def prepare(
        self, rollout: Rollout, *, healthy: Bool[Tensor, ""], ranks: Ranks, generator: Generator
    ) -> Prepared:
        """Reward each step for what it reached."""
        reached, shape = map_obs(Tensor.float, rollout.reached_obs), rollout.reward.shape
        self.normalizer.update(reached, ranks, where=healthy)
        obs = self.normalizer(reached)
        rows = map_tree(lambda group: group.flatten(0, 1), obs)
        target = self.target(rows)
        error = self._error(rows, target).view(shape)
        # Each rollout continues from the mean of the sums so far, whichever environments it has.
        carried = self.error_return.mean.to(error.dtype).expand(shape[1])
        endless = torch.zeros_like(rollout.terminated)
        sums, _ = discounted_returns(error, endless, carried, discount=self.spec.discount)
        gathered = ranks.gather(Moments.of(sums))
        finite = torch.stack([each.variance.isfinite() for each in gathered]).all()
        self.error_return.update(*gathered, where=healthy & finite)
        reward = self.spec.coefficient * self.error_return.scale(error, clip=float("inf"))
        trains = torch.rand(shape, generator=generator, device=error.device)
        kept = (obs, target.view(*shape, -1), trains < self.spec.keep_fraction)
        return Prepared(reward, kept, {"rnd/reward": reward.mean()})

    @override
    def losses(
        self, batch: Samples, kept: Any, evaluate: Callable[[Samples], Evaluation]
    ) -> dict[str, Float[Tensor, " M"]]:
        """The error of the predictor at the samples that train it."""
        obs, target, trains = kept
        error = self._error(obs, target) / self.spec.keep_fraction
        return {"rnd": torch.where(trains, error, 0.0)}

    def _error(self, obs: Observation, target: Float[Tensor, "M F"]) -> Float[Tensor, " M"]:
        return (self.predictor(obs) - target).float().square().mean(-1)
