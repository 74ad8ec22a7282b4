"""The graphs that Inductor gets on CUDA: those of the four stages of an iteration."""

from collections.abc import Callable
from typing import Any

import torch

from esper_lightning import MLP, PPOConfig, Recurrent
from esper_lightning.compiling import stepwise, tracing
from esper_lightning.envs import CartPole, Pendulum

FULL = PPOConfig(
    rollout_steps=4, epochs=2, minibatches=2, target_kl=0.02, normalize_obs=True,
    normalize_reward=True, value_clip=0.2,
)  # fmt: skip
CASES = {
    "cartpole": (CartPole(num_envs=64), MLP(), FULL, ()),
    "tanh": (Pendulum(num_envs=64), MLP(action_bounds="tanh"), FULL, ()),
    "gru": (CartPole(num_envs=64), Recurrent(), FULL, ()),
}
STAGES = ("rollout", "values", "advantages", "update")  # in the order of their first calls


def stages_of(iterate: Callable[[], object]) -> list[tuple[Any, list[torch.Tensor]]]:
    """The graphs of an iteration, in the order of ``STAGES``, with the tensors of the first call.

    Args:
        iterate: Function that builds a learner whose stages are compiled, and runs an iteration.
    """
    found: list[tuple[Any, list[torch.Tensor]]] = []

    def note(graph: Any) -> Any:
        def run(*tensors: torch.Tensor) -> Any:
            if all(graph is not known for known, _ in found):
                found.append((graph, [_copy(tensor) for tensor in tensors]))
            return graph(*tensors)

        return run

    for module in (stepwise, tracing):
        module.compile_graph = note
    iterate()
    return found


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is now, for a stage may change it; with the same strides."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)
