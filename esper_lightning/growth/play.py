"""Episodes of policies and baselines on the same hosts of ``Morphogenesis``.

Axes: ``T`` epoch, ``B`` host, ``S`` slot. Nothing here trains a policy.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.compiling.loops import few_cpu_threads
from esper_lightning.core.seeding import stream, stream_seed
from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.core.tensor_trees import map_tree
from esper_lightning.core.types import Observation
from esper_lightning.envs.base import EnvSpec, built_env
from esper_lightning.envs.morphogenesis import MorphogenesisEnv, StepReport
from esper_lightning.envs.morphogenesis.baselines import BASELINES, Baseline
from esper_lightning.envs.morphogenesis.population import Kinds
from esper_lightning.policies.base import Policy
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.ppo.collect import Normalize
from esper_lightning.training.module import PPO
from esper_lightning.training.specs import evaluation_spec

__all__ = [
    "Choose",
    "Course",
    "Played",
    "fresh_hosts",
    "play",
    "play_baselines",
    "play_trained",
    "trained",
]

Choose = Callable[[Observation, Tensor], Tensor]
"""A function that returns actions ``[B, 4]`` for an observation and its mask."""


class Course(NamedTuple):
    """Measurements of the hosts in each epoch; rows after a host's last epoch mean nothing."""

    accuracy: Float[Tensor, "T B"]  # on the validation split
    loss: Float[Tensor, "T B"]  # on the validation split, nats; not finite where a host diverged
    action: Int[Tensor, "T B 4"]  # taken before the epoch
    stage: Int[Tensor, "T B S"]
    blueprint: Int[Tensor, "T B S"]  # position in BLUEPRINTS; 0 where there is no seed
    alpha: Float[Tensor, "T B S"]


class Played(NamedTuple):
    """The first episode of each host, in memory of the CPU."""

    episode_return: Float[Tensor, " B"]
    episode_length: Int[Tensor, " B"]
    test_accuracy: Float[Tensor, " B"]  # at the end of the episode
    grown_parameters: Int[Tensor, " B"]  # at the end of the episode
    diverged: Bool[Tensor, " B"]
    course: Course
    kinds: Kinds | None  # of the hosts; None where all are alike


@contextlib.contextmanager
def fresh_hosts(
    spec: EnvSpec, *, hosts: int | None, device: torch.device, seed: int
) -> Generator[MorphogenesisEnv]:
    """Hosts that were used neither in training nor to choose the best checkpoint, then closed.

    Args:
        spec: Settings of the environment, a ``Morphogenesis``.
        hosts: Number of hosts; ``None`` for as many as an evaluation has by default.
        device: Device of the hosts.
        seed: Seed of the hosts; equal seeds give equal hosts.
    """
    chosen = stream_seed(seed, rank=0, purpose="fresh hosts")
    with built_env(evaluation_spec(spec, hosts), device, chosen) as env:
        assert isinstance(env, MorphogenesisEnv)
        yield env


def play_trained(model: PPO, env: MorphogenesisEnv) -> Iterator[tuple[str, Played]]:
    """Play a model's most probable actions, and then its sampled actions, on the same hosts."""
    device = env.hosts.episode.device
    policy = model.policy.to(device)
    normalizer = None if model.obs_normalizer is None else model.obs_normalizer.to(device)
    generator = stream(model.seed, rank=0, purpose="drawn actions", device=device)

    def normalize(obs: Observation) -> Observation:
        return prepare_obs(obs, normalizer)

    yield "PPO", _play_from_here(env, trained(policy, normalize))
    yield "PPO, actions drawn", _play_from_here(env, trained(policy, normalize, generator))


def play_baselines(
    env: MorphogenesisEnv, baselines: Mapping[str, Baseline] = BASELINES
) -> Iterator[tuple[str, Played]]:
    """Play each baseline on the same hosts."""
    for name, baseline in baselines.items():
        yield name, _play_from_here(env, _choose_by(baseline, env))


def trained(policy: Policy, normalize: Normalize, drawn: torch.Generator | None = None) -> Choose:
    """A function that chooses actions by a policy, to be called from the first step of episodes.

    Args:
        policy: Policy with or without memory.
        normalize: Function that normalizes observations by the statistics of training.
        drawn: Generator that samples actions; ``None`` for the most probable ones.
    """
    memory: Tensor | None = None
    begins = True

    def choose(obs: Observation, mask: Tensor) -> Tensor:
        nonlocal memory, begins
        if begins:
            memory, begins = policy.initial_memory(obs), False
        seen, memory = policy.step_memory(normalize(obs), memory)
        if drawn is None:
            return policy.to_env(policy.act_deterministically(seen, mask))
        noise = policy.noise((len(mask),), drawn)
        return policy.to_env(policy.act(seen, mask, noise).action)

    return choose


@torch.no_grad()
def play(env: MorphogenesisEnv, choose: Choose) -> Played:
    """Train the next host of every environment to its end.

    Args:
        env: Environment, which is reset, and whose ``tests_ends`` is set.
        choose: Function that chooses actions, called once before each epoch. Episodes of hosts that
            begin because another host has diverged are not counted.
    """
    env.tests_ends = True
    obs, mask = env.reset()
    kinds = env.kinds()
    ends: list[tuple[Tensor, ...]] = []
    courses: list[Course] = []
    with few_cpu_threads(env.num_envs):
        for _ in range(env.epochs):
            action = choose(obs, mask)
            result = env.step(action)
            report = cast(StepReport, env.report)
            ends.append(
                (
                    *(result.episode_return, result.episode_length, report.test_accuracy),
                    *(report.grown_parameters, report.diverged),
                )
            )
            growth = (report.stage, report.blueprint, report.alpha)
            courses.append(Course(report.accuracy, report.loss, action, *growth))
            obs, mask = result.obs, cast(Tensor, result.action_mask)
    # Hosts begin together, and none continues after the last epoch: each ended at least once.
    first = (torch.stack([length for _, length, *_ in ends]) > 0).int().argmax(0, keepdim=True)
    at_end = [torch.stack(steps).gather(0, first)[0] for steps in zip(*ends, strict=True)]
    course = Course._make(torch.stack(steps) for steps in zip(*courses, strict=True))
    return cast(Played, map_tree(Tensor.cpu, Played._make((*at_end, course, kinds))))


def _choose_by(baseline: Baseline, env: MorphogenesisEnv) -> Choose:
    def choose(obs: Observation, mask: Tensor) -> Tensor:
        del obs, mask
        return baseline(env)

    return choose


def _play_from_here(env: MorphogenesisEnv, choose: Choose) -> Played:
    """Play, and then restore the environment, so that the next policy plays the same hosts."""
    here = env.state_dict()
    played = play(env, choose)
    env.load_state_dict(here)
    return played
