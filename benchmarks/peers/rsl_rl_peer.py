"""PPO on CartPole with rsl_rl (Schwarke et al. 2025).

One call is ``OnPolicyRunner.learn(1)``: ``steps`` times ``act``, ``env.step`` and
``process_env_step``, then ``compute_returns`` and ``update``. No log folder, no check for NaN.
The library has no distribution over choices; one is plugged in where it takes distributions.
Axes: ``B`` environment, ``K`` choice.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.modules.distribution import Distribution
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from torch import Tensor

from esper_lightning.envs.cartpole import CartPole

SEED = 0


class TorchCartPole(VecEnv):
    """The batched environment of this package; the one action component is the choice."""

    def __init__(self, num_envs: int) -> None:
        spec = CartPole(num_envs=num_envs)
        self._env = spec.build(torch.device("cpu"), SEED)
        self.num_envs = num_envs
        self.num_actions = 1
        self.max_episode_length = spec.time_limit
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.int64)
        self.device = "cpu"
        self.cfg = {}
        with torch.inference_mode():  # like every later one: compiled models are specialised on it
            self._obs = self._group(self._env.reset()[0])

    def get_observations(self) -> TensorDict:
        return self._obs

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict[str, Tensor]]:
        result = self._env.step(actions[:, 0])
        self._obs = self._group(result.obs)
        ended = result.terminated | result.truncated
        return self._obs, result.reward, ended, {"time_outs": result.truncated}

    def _group(self, obs: Tensor) -> TensorDict:
        return TensorDict({"policy": obs}, batch_size=[self.num_envs])


class Categorical(Distribution):
    """A distribution over choices, stored as log probabilities ``[B, K]``; samples ``[B, 1]``."""

    def __init__(self, output_dim: int, choices: int) -> None:
        super().__init__(output_dim)
        self._choices = choices
        self._log_probs: Tensor | None = None

    def update(self, mlp_output: Tensor) -> None:
        self._log_probs = mlp_output.log_softmax(-1)

    def sample(self) -> Tensor:
        return self._logs.exp().multinomial(1).float()

    def deterministic_output(self, mlp_output: Tensor) -> Tensor:
        return mlp_output.argmax(-1, keepdim=True)

    def log_prob(self, outputs: Tensor) -> Tensor:
        return self._logs.gather(-1, outputs.long())[..., 0]

    @property
    def input_dim(self) -> int:
        return self._choices

    @property
    def std(self) -> Tensor:
        """The standard deviation, which the library's log reads once an iteration."""
        return self._logs.exp().std(-1)

    @property
    def entropy(self) -> Tensor:
        return -(self._logs.exp() * self._logs).sum(-1)

    @property
    def params(self) -> tuple[Tensor, ...]:
        return (self._logs,)

    @property
    def _logs(self) -> Tensor:
        assert self._log_probs is not None
        return self._log_probs


def build(
    num_envs: int,
    steps: int,
    epochs: int,
    minibatches: int,
    *,
    threads: int,
    compile: bool = False,  # noqa: A002 - the library's word
) -> Callable[[], None]:
    """A function of one iteration; ``compile`` compiles actor and critic separately."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    settings = _settings(steps, epochs, minibatches)
    settings["torch_compile_mode"] = "default" if compile else None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints both models
        runner = OnPolicyRunner(TorchCartPole(num_envs), settings, log_dir=None, device="cpu")

    def iterate() -> None:
        runner.learn(1)

    return iterate


def _settings(steps: int, epochs: int, minibatches: int) -> dict[str, Any]:
    tower = {"class_name": "MLPModel", "hidden_dims": [64, 64], "activation": "tanh"}
    return {
        "num_steps_per_env": steps,
        "check_for_nan": False,
        "save_interval": 1,  # of no effect without a log folder
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**tower, "distribution_cfg": {"class_name": Categorical, "choices": 2}},
        "critic": tower,
        "algorithm": {
            "class_name": "PPO",
            "num_learning_epochs": epochs,
            "num_mini_batches": minibatches,
            "learning_rate": 3e-4,
            "schedule": "fixed",
            "desired_kl": None,
            "clip_param": 0.2,
            "use_clipped_value_loss": False,
            "value_loss_coef": 0.5,
            "entropy_coef": 0.0,
            "gamma": 0.99,
            "lam": 0.95,
            "max_grad_norm": 0.5,
        },
    }
