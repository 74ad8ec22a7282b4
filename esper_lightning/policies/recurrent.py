"""Policies with memory: a recurrent cell between encoder and actor-critic.

Axes: ``T`` step, ``M`` sample, ``*O`` observation, ``H`` feature, ``S`` number in a memory.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from esper_lightning.core.errors import at_least, check_fields, require
from esper_lightning.core.recurrence import Cell, unroll
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.types import Observation
from esper_lightning.policies.actor_critic import build_actor_critic
from esper_lightning.policies.base import Evaluation, Policy, PolicySpec, SampledAction
from esper_lightning.policies.encoders import (
    Encoder,
    EncoderSpec,
    FlatEncoder,
    HiddenLayers,
    with_hidden_layers,
)
from esper_lightning.policies.layers import (
    Activation,
    check_layers,
    check_std,
    check_widest,
    orthogonal_linear,
)

__all__ = ["Recurrent", "RecurrentPolicy"]


@dataclass(frozen=True, kw_only=True)
class Recurrent(PolicySpec):
    """Actor and critic that see the output of a recurrent cell, which remembers the episode.

    Actor and critic share the cell, and each has hidden layers of its own behind the cell. Sharing
    saves time, since the steps of the cell must wait for each other. It also helps to learn: from
    the first step on, the critic's errors teach the cell what is worth remembering. But value
    errors far above 1 would drown what the actor teaches the cell, so observations and rewards
    should be scaled (``PPOConfig.normalize_obs`` and ``PPOConfig.normalize_reward``).

    The memory begins blank with each episode. Gradients reach back over the steps of one rollout:
    the cell can remember for longer than ``PPOConfig.rollout_steps``, but does not learn to.

    Attributes:
        cell: Kind of the cell: ``gru`` is a gated recurrent unit, ``lstm`` a long short-term
            memory.
        memory_size: Width of the cell.
        encoder: Encoder of observations: ``Image()`` for images, ``Imported(path=...)`` for a
            network of your own, ``Groups(...)`` for an encoder of each group, or ``None`` for
            observations that are vectors.
        encoder_sizes: Width of each hidden layer between encoder and cell. An empty list means no
            such layer.
        hidden_sizes: Width of each hidden layer behind the cell, for actor and critic alike.
        activation: Nonlinearity after each hidden layer.
        action_bounds: Way to keep continuous actions within a bounded action space: ``clip`` cuts
            sampled actions at the bounds, ``tanh`` squashes the distribution into the bounds.
        initial_std: Standard deviation of continuous actions at the start, in units where the
            bounds are -1 and 1.
    """

    cell: Cell = "gru"
    memory_size: int = 64
    encoder: EncoderSpec | None = None
    encoder_sizes: tuple[int, ...] = (64,)
    hidden_sizes: tuple[int, ...] = (64,)
    activation: Activation = "tanh"
    action_bounds: Literal["clip", "tanh"] = "clip"
    initial_std: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        size, encoder_sizes = self.memory_size, self.encoder_sizes
        at_least("Recurrent.memory_size", size, 1)
        check_widest("Recurrent.memory_size", size)
        ok = min(encoder_sizes, default=1) >= 1
        require(ok, "Recurrent.encoder_sizes", "be widths of at least 1", encoder_sizes)
        check_widest("Recurrent.encoder_sizes", *encoder_sizes)
        check_layers("Recurrent", self.hidden_sizes)
        check_std("Recurrent", self.initial_std)
        ok = self.encoder is None or isinstance(self.encoder, EncoderSpec)  # pyright: ignore[reportUnnecessaryIsInstance]
        rule = "be an encoder spec, such as Image(), or None"
        require(ok, "Recurrent.encoder", rule, self.encoder)

    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
        """Build the policy on the CPU; ``generator`` is the only source of randomness.

        Raises:
            ValueError: If no head fits the action space.
        """
        return RecurrentPolicy(self, spaces, generator)


class RecurrentPolicy(Policy):
    """The policy of ``Recurrent``: an encoder, a cell, and an actor-critic behind the cell."""

    def __init__(self, spec: Recurrent, spaces: EnvSpaces, generator: torch.Generator) -> None:
        super().__init__()
        self._cell: Cell = spec.cell
        self._size = size = spec.memory_size
        gates = {"gru": 3, "lstm": 4}[spec.cell]
        self.memory_size = {"gru": size, "lstm": 2 * size}[spec.cell]

        if spec.encoder is None:
            self.encoder: Encoder = FlatEncoder(
                spaces.obs,
                None,
                spec.encoder_sizes,
                activation=spec.activation,
                generator=generator,
            )
        else:
            self.encoder = with_hidden_layers(
                spec.encoder.build_encoder(spaces.obs, generator),
                spec.encoder_sizes,
                activation=spec.activation,
                generator=generator,
            )

        def gate_inputs(inputs: int) -> nn.Linear:
            outputs = gates * size
            return orthogonal_linear(inputs, outputs, gain=1.0, generator=generator, chunks=gates)

        self.from_input = gate_inputs(self.encoder.features)
        self.from_memory = gate_inputs(size)

        def behind_cell() -> Encoder:
            return HiddenLayers(
                size, spec.hidden_sizes, activation=spec.activation, generator=generator
            )

        self.decides = build_actor_critic(
            behind_cell(),
            behind_cell(),
            spaces.action,
            owner="Recurrent",
            action_bounds=spec.action_bounds,
            initial_std=spec.initial_std,
            generator=generator,
        )

    def step_memory(
        self, obs: Observation, memory: Float[Tensor, "M S"] | None
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "M S"]]:
        """The output of the cell, and the memory, after one observation of each row."""
        assert memory is not None
        after = self._unroll(obs, memory, None)[0]
        return self._output(after), after

    def unroll_memory(
        self,
        obs: Observation,
        memory: Float[Tensor, "M S"] | None,
        begins: Bool[Tensor, " N"] | None,
    ) -> tuple[Float[Tensor, "N H"], Float[Tensor, "N S"]]:
        """The output of the cell, and the memory, after each row of ``M`` sequences."""
        assert memory is not None
        assert begins is not None
        after = self._unroll(obs, memory, begins.view(-1, len(memory))).flatten(0, 1)
        return self._output(after), after

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "... N"]:
        """Random numbers for ``act``: ``[*shape, N]``, on the device of the generator."""
        return self.decides.noise(shape, generator)

    def act(
        self, obs: Observation, mask: Bool[Tensor, "M K"] | None, noise: Float[Tensor, "M N"]
    ) -> SampledAction:
        """Sample an action for each output of the cell; only ``noise`` is random."""
        return self.decides.act(obs, mask, noise)

    def act_deterministically(
        self, obs: Observation, mask: Bool[Tensor, "M K"] | None
    ) -> Shaped[Tensor, "M *A"]:
        """The most probable action for each output of the cell."""
        return self.decides.act_deterministically(obs, mask)

    def evaluate(
        self, obs: Observation, action: Shaped[Tensor, "M *A"], mask: Bool[Tensor, "M K"] | None
    ) -> Evaluation:
        """Log-probability of given actions, entropy and value of each row, with gradients."""
        return self.decides.evaluate(obs, action, mask)

    def value(self, obs: Observation) -> Float[Tensor, " M"]:
        """Value of each output of the cell."""
        return self.decides.value(obs)

    def to_env(self, action: Shaped[Tensor, "M *A"]) -> Shaped[Tensor, "M ..."]:
        """Sampled actions in the environment's units and range."""
        return self.decides.to_env(action)

    def _unroll(
        self, obs: Observation, memory: Tensor, begins: Tensor | None
    ) -> Float[Tensor, "T M S"]:
        """The memory after each of ``T`` steps; float32, also under autocast."""
        x = self.from_input(self.encoder(obs)).to(memory.dtype)
        x = x.view(-1 if begins is not None else 1, *memory.shape[:1], x.shape[-1])
        return unroll(self._cell, x, begins, memory, self.from_memory.weight, self.from_memory.bias)

    def _output(self, memory: Tensor) -> Tensor:
        """The output of the cell, the first half of an LSTM's memory or all of a GRU's."""
        return memory[:, : self._size]
