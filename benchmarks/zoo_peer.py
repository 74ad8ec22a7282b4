"""One run of a config of the zoo with Stable-Baselines3 (Raffin et al. 2021), on one thread.

Actions are clipped to their bounds, where this package scales them; the bounds of the zoo's tasks
are -1 and 1. A linear learning rate ends at zero, as here.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

CONFIGS = Path(__file__).resolve().parents[1] / "esper_lightning" / "configs"


def normalized(env: VecEnv, ppo: dict[str, Any], *, training: bool) -> VecEnv:
    """The environment with the running statistics that the config asks for."""
    obs, reward = ppo.get("normalize_obs", False), ppo.get("normalize_reward", False)
    if not obs and not reward:
        return env
    return VecNormalize(
        env,
        training=training,
        norm_obs=obs,
        norm_reward=reward and training,
        gamma=ppo.get("discount", 0.99),
    )


def train(config: str, seed: int, env_steps: int, episodes: int) -> dict[str, float]:
    """Train one run and evaluate its last policy."""
    torch.set_num_threads(1)
    model = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]
    ppo, made, sizes = model["ppo"], model["env"]["init_args"], model["policy"]["init_args"]
    env = normalized(
        make_vec_env(made["id"], n_envs=made["num_envs"], seed=seed), ppo, training=True
    )
    rate = ppo.get("learning_rate", 3e-4)
    linear = ppo.get("learning_rate_schedule") == "linear"
    learner = PPO(
        "MlpPolicy",
        env,
        learning_rate=(lambda left: rate * left) if linear else rate,
        n_steps=ppo["rollout_steps"],
        batch_size=ppo["rollout_steps"] * made["num_envs"] // ppo["minibatches"],
        n_epochs=ppo["epochs"],
        gamma=ppo.get("discount", 0.99),
        gae_lambda=ppo.get("gae_lambda", 0.95),
        ent_coef=ppo.get("entropy_coef", 0.0),
        policy_kwargs={
            "net_arch": {"pi": sizes["hidden_sizes"], "vf": sizes["hidden_sizes"]},
            "activation_fn": torch.nn.Tanh,
            "optimizer_kwargs": {"eps": 1e-5},
        },
        seed=seed,
        device="cpu",
    )
    learner.set_logger(Logger(folder=None, output_formats=[]))
    start = time.monotonic()
    learner.learn(env_steps, log_interval=None)
    took_s = time.monotonic() - start
    fresh = normalized(make_vec_env(made["id"], n_envs=8, seed=seed + 1000), ppo, training=False)
    if isinstance(fresh, VecNormalize) and isinstance(env, VecNormalize):
        fresh.obs_rms = env.obs_rms
    mean, std = evaluate_policy(learner, fresh, episodes, deterministic=True)
    return {"return_mean": float(mean), "return_std": float(std), "train_time_s": round(took_s, 1)}


def run() -> None:
    """Train as the command line says (config, seed, env steps, episodes), and print the result."""
    logging.disable(logging.INFO)
    name, *numbers = sys.argv[1:]
    print(json.dumps(train(name, *map(int, numbers))))
