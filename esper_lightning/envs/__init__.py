"""Batched environments: protocol, check of the protocol, classic control, growing networks."""

from esper_lightning.envs.acrobot import Acrobot
from esper_lightning.envs.base import BatchedEnv, EnvSpec
from esper_lightning.envs.cartpole import CartPole
from esper_lightning.envs.check import check_env
from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.mountain_car import MountainCar
from esper_lightning.envs.pendulum import Pendulum

__all__ = [
    "Acrobot",
    "BatchedEnv",
    "CartPole",
    "EnvSpec",
    "Morphogenesis",
    "MountainCar",
    "Pendulum",
    "check_env",
]
