"""PPO on CartPole with Stable-Baselines3 (Raffin et al. 2021).

One call is ``PPO.learn`` for ``steps * num_envs`` environment steps: ``collect_rollouts`` (with
``compute_returns_and_advantage``), then ``train``. No metrics are written. Axis: ``B`` environment.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from esper_lightning.envs.cartpole import CartPole

SEED = 0
NOTHING: dict[str, Any] = {}  # the info of a step in which no episode ended


class TorchCartPole(VecEnv):
    """The batched environment of this package, whose tensors NumPy reads without a copy."""

    render_mode = None

    def __init__(self, num_envs: int) -> None:
        self._env = CartPole(num_envs=num_envs).build(torch.device("cpu"), SEED)
        self._action = torch.zeros(num_envs, dtype=torch.int64)
        obs = spaces.Box(-np.inf, np.inf, (4,), np.float32)
        super().__init__(num_envs, obs, spaces.Discrete(2))

    def reset(self) -> np.ndarray:
        return self._env.reset()[0].numpy()

    def step_async(self, actions: np.ndarray) -> None:
        self._action = torch.from_numpy(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        result = self._env.step(self._action)
        ended = (result.terminated | result.truncated).numpy()
        truncated, reached = result.truncated.numpy(), result.reached_obs.numpy()
        infos = [NOTHING] * self.num_envs
        for index in ended.nonzero()[0]:
            infos[index] = {
                "terminal_observation": reached[index],
                "TimeLimit.truncated": bool(truncated[index]),
            }
        return result.obs.numpy(), result.reward.numpy(), ended, infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, *args: Any, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:  # noqa: ARG002
        return [False] * len(self._rows(indices))

    def _rows(self, indices: Any) -> Sequence[int]:
        return list(self._get_indices(indices))


def build(
    num_envs: int, steps: int, epochs: int, minibatches: int, *, threads: int
) -> Callable[[], None]:
    """A function of one iteration, over the environment of this package."""
    torch.set_num_threads(threads)
    return _iteration(TorchCartPole(num_envs), steps, epochs, minibatches)


def build_gymnasium(
    num_envs: int, steps: int, epochs: int, minibatches: int, *, threads: int
) -> Callable[[], None]:
    """A function of one iteration, over ``DummyVecEnv`` of ``CartPole-v1`` with monitors."""
    torch.set_num_threads(threads)
    env = make_vec_env("CartPole-v1", n_envs=num_envs, seed=SEED)
    return _iteration(env, steps, epochs, minibatches)


def _iteration(env: VecEnv, steps: int, epochs: int, minibatches: int) -> Callable[[], None]:
    total = steps * env.num_envs
    model = PPO(
        "MlpPolicy",
        env,
        learning_rate=3e-4,
        n_steps=steps,
        batch_size=total // minibatches,
        n_epochs=epochs,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        ent_coef=0.0,
        vf_coef=0.5,
        max_grad_norm=0.5,
        policy_kwargs={
            "net_arch": {"pi": [64, 64], "vf": [64, 64]},
            "activation_fn": torch.nn.Tanh,
            "optimizer_kwargs": {"eps": 1e-5, "fused": True},
        },
        seed=SEED,
        device="cpu",
    )
    model.set_logger(Logger(folder=None, output_formats=[]))

    def iterate() -> None:
        model.learn(total, log_interval=None, reset_num_timesteps=False)

    return iterate
