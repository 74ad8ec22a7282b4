"""The graphs that Inductor gets on CUDA: the stages of an iteration, and an update of hosts."""

from collections.abc import Callable
from typing import Any

import torch

from esper_lightning import MLP, PPOConfig, Recurrent
from esper_lightning.compiling import loops, stepwise, tracing
from esper_lightning.envs import CartPole, Morphogenesis, Pendulum
from esper_lightning.envs.morphogenesis.training import static_update

FULL = PPOConfig(
    rollout_steps=4, epochs=2, minibatches=2, target_kl=0.02, normalize_obs=True,
    normalize_reward=True, value_clip=0.2,
)  # fmt: skip
CASES = {
    "cartpole": (CartPole(num_envs=64), MLP(), FULL, ()),
    "tanh": (Pendulum(num_envs=64), MLP(action_bounds="tanh"), FULL, ()),
    "gru": (CartPole(num_envs=64), Recurrent(), FULL, ()),
}
GROWTH = Morphogenesis.digits(num_envs=4, train_batches=1, compiled=True)
STAGES = ("rollout", "values", "advantages", "update")  # in the order of their first calls


def step_of_hosts(device: torch.device) -> None:
    """A step of ``GROWTH``, whose update is compiled on a CPU as well."""
    env = GROWTH.build(device, 0, static=True)
    trainer = env.trainer
    update = static_update(trainer.architecture, GROWTH.sgd())
    trainer._update = loops.compile_function("hosts", update, mode="default", device=device)
    env.reset()
    env.step(torch.zeros(GROWTH.num_envs, 4, dtype=torch.int64, device=device))


def stages_of(iterate: Callable[[], object]) -> list[tuple[Any, list[torch.Tensor]]]:
    """The compiled graphs of an iteration, in order, with the tensors of the first call of each.

    Args:
        iterate: Function that builds what is compiled, and runs an iteration.
    """
    found: list[tuple[Any, list[torch.Tensor]]] = []

    def note(graph: Any) -> Any:
        tracing.suit_compiler(graph)

        def run(*tensors: torch.Tensor) -> Any:
            if all(graph is not known for known, _ in found):
                found.append((graph, [copy_of(tensor) for tensor in tensors]))
            return graph(*tensors)

        return run

    for module in (stepwise, tracing):
        module.compile_graph = note
    iterate()
    return found


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is now, for a stage may change it; with the same strides."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)
