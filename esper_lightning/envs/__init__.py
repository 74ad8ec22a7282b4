"""Batched environments: protocol, check of the protocol, classic control, growing networks."""

from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.core.types import StepResult
from esper_lightning.envs.acrobot import Acrobot
from esper_lightning.envs.adapters.custom import Custom
from esper_lightning.envs.adapters.envpool import EnvPool
from esper_lightning.envs.adapters.gymnasium import Gymnasium
from esper_lightning.envs.adapters.jax import Brax, Gymnax
from esper_lightning.envs.adapters.simulated import Simulator, Stepped
from esper_lightning.envs.base import BatchedEnv, EnvSpec, RunProgress
from esper_lightning.envs.cartpole import CartPole
from esper_lightning.envs.check import check_env
from esper_lightning.envs.frame_stack import FrameStack
from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.mountain_car import MountainCar
from esper_lightning.envs.pendulum import Pendulum

__all__ = [
    "Acrobot",
    "BatchedEnv",
    "Box",
    "Brax",
    "CartPole",
    "Custom",
    "Discrete",
    "EnvPool",
    "EnvSpaces",
    "EnvSpec",
    "FrameStack",
    "Gymnasium",
    "Gymnax",
    "Morphogenesis",
    "MountainCar",
    "Pendulum",
    "RunProgress",
    "Simulator",
    "StepResult",
    "Stepped",
    "check_env",
]
