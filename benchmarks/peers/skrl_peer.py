"""PPO on CartPole with skrl (Serrano-Munoz et al. 2023).

One call is ``SequentialTrainer.train`` for ``steps`` steps: ``pre_interaction``, ``act``,
``env.step``, ``record_transition`` and ``post_interaction``, of which the last one updates. No
metrics are written, no checkpoints. Axis: ``B`` environment.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import Wrapper
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
from skrl.trainers.torch import SequentialTrainer
from torch import Tensor, nn

from esper_lightning.envs.cartpole import CartPole

SEED = 0
OBS_SPACE = spaces.Box(-np.inf, np.inf, (4,), np.float32)
ACTION_SPACE = spaces.Discrete(2)


class TorchCartPole(Wrapper):
    """The batched environment of this package.

    ``train`` resets at its start. As in the library's wrapper of Isaac Lab, only the first reset
    starts episodes; later resets continue the running episodes.
    """

    def __init__(self, num_envs: int) -> None:
        super().__init__(CartPole(num_envs=num_envs).build(torch.device("cpu"), SEED))
        self._obs = self._env.reset()[0]

    def reset(self) -> tuple[Tensor, dict[str, Any]]:
        return self._obs, {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        result = self._env.step(actions[:, 0])
        self._obs = result.obs
        reward = result.reward.unsqueeze(-1)
        return self._obs, reward, result.terminated[:, None], result.truncated[:, None], {}

    def state(self) -> None:
        return None

    def render(self, *args: Any, **kwargs: Any) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def observation_space(self) -> spaces.Space[Any]:
        return OBS_SPACE

    @property
    def action_space(self) -> spaces.Space[Any]:
        return ACTION_SPACE


class Actor(CategoricalMixin, Model):
    """The actor, which returns logits of both choices."""

    def __init__(self) -> None:
        Model.__init__(self, **_spaces())
        CategoricalMixin.__init__(self)
        self.net = _tower(2)

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[Tensor, dict[str, Any]]:  # noqa: ARG002
        return self.net(inputs["observations"]), {}


class Critic(DeterministicMixin, Model):
    """The critic, which returns values ``[B, 1]``."""

    def __init__(self) -> None:
        Model.__init__(self, **_spaces())
        DeterministicMixin.__init__(self)
        self.net = _tower(1)

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[Tensor, dict[str, Any]]:  # noqa: ARG002
        return self.net(inputs["observations"]), {}


def build(
    num_envs: int, steps: int, epochs: int, minibatches: int, *, threads: int
) -> Callable[[], None]:
    """A function of one iteration."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    config = PPO_CFG(
        rollouts=steps,
        learning_epochs=epochs,
        mini_batches=minibatches,
        discount_factor=0.99,
        gae_lambda=0.95,
        learning_rate=3e-4,
        grad_norm_clip=0.5,
        ratio_clip=0.2,
        value_clip=0.0,  # off
        entropy_loss_scale=0.0,
        value_loss_scale=0.5,
        time_limit_bootstrap=True,
    )
    config.experiment.write_interval = config.experiment.checkpoint_interval = 0
    agent = PPO(
        models={"policy": Actor(), "value": Critic()},
        memory=RandomMemory(memory_size=steps, num_envs=num_envs, device="cpu"),
        cfg=config,
        **_spaces(),
    )
    trainer = SequentialTrainer(
        env=TorchCartPole(num_envs),
        agents=agent,
        cfg={
            "timesteps": steps,
            "headless": True,
            "disable_progressbar": True,
            "close_environment_at_exit": False,
        },
    )
    return trainer.train


def _spaces() -> dict[str, Any]:
    return {"observation_space": OBS_SPACE, "action_space": ACTION_SPACE, "device": "cpu"}


def _tower(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
    )
