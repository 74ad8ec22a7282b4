"""One rank of a small process group: ``python halves.py RANK SIZE DIRECTORY``.

Every rank learns from its share of the environments of one rollout, and saves what came of it.
"""

import datetime
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from esper_lightning import MLP, RND, PPOConfig, Recurrent
from esper_lightning.core.ranks import Ranks
from esper_lightning.core.running_stats import ObsNormalizer, RunningStats
from esper_lightning.core.types import Rollout
from esper_lightning.envs import CartPole
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.extension import Extensions
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.optimizer import build_optimizer

STEPS, ENVS, CPU = 16, 6, torch.device("cpu")
CASES = {
    "one step": PPOConfig(rollout_steps=STEPS, epochs=1, minibatches=1, max_grad_norm=None),
    "statistics": PPOConfig(
        rollout_steps=STEPS, epochs=3, minibatches=4, normalize_obs=True, normalize_reward=True
    ),
    "stops": PPOConfig(
        rollout_steps=STEPS, epochs=6, minibatches=2, learning_rate=0.01, target_kl=0.02
    ),
    "memory": PPOConfig(rollout_steps=STEPS, epochs=3, minibatches=1),
    "extensions": PPOConfig(rollout_steps=STEPS, epochs=3, minibatches=4, normalize_reward=True),
    "choices": PPOConfig(rollout_steps=STEPS, epochs=3, minibatches=4, entropy_coef=0.1),
}


def everything(*, masked):
    """A rollout of all environments, as a policy unlike that of ``learn`` might have made it."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    ends = torch.rand(2, STEPS, ENVS, generator=generator) < 0.1
    ended = ends.any(0)
    action = torch.randint(2, (STEPS, ENVS), generator=generator)
    # The first environments hardly ever have a choice.
    allowed = (
        torch.rand(STEPS, ENVS, 2, generator=generator) < torch.linspace(0.1, 0.9, ENVS)[:, None]
    )
    allowed |= torch.nn.functional.one_hot(action, 2).bool()
    return Rollout(
        obs=3.0 + 2.0 * normal(STEPS, ENVS, 4),
        reached_obs=3.0 + 2.0 * normal(STEPS, ENVS, 4),
        action=action,
        log_prob=-0.7 + 0.1 * normal(STEPS, ENVS),
        action_mask=allowed if masked else None,
        reward=normal(STEPS, ENVS),
        terminated=ends[0],
        truncated=ends[1] & ~ends[0],
        episode_return=torch.where(ended, normal(STEPS, ENVS), torch.nan),
        episode_length=torch.where(ended, 7, 0),
    )


def shared_order(config, rank, size):
    """Indices of one rank's samples in the minibatches that all ranks share."""
    generator = torch.Generator().manual_seed(4)
    mine = torch.arange(STEPS * ENVS).view(STEPS, size, -1)[:, rank].reshape(-1)
    local = torch.full((STEPS * ENVS,), -1)
    local[mine] = torch.arange(len(mine))
    strata = torch.arange(STEPS * ENVS).view(STEPS, 2, -1).transpose(0, 1).reshape(2, -1)
    orders = []
    for _ in range(config.epochs):
        # Each of two ranks is to have equally many samples of every minibatch.
        order = torch.randperm(strata.shape[1], generator=generator)
        shuffled = strata[:, order].view(2, config.minibatches, -1).transpose(0, 1)
        orders += list(shuffled.reshape(config.minibatches, -1))
    return torch.stack([local[order][local[order] >= 0] for order in orders])


def learn(rank, size, case, mode="off"):
    """The results of one update."""
    config, ranks = CASES[case], Ranks(size)
    spec = CartPole(num_envs=ENVS // size)
    kind = Recurrent(cell="lstm") if case == "memory" else MLP()
    policy = kind.build(spec.spaces(), torch.Generator().manual_seed(0))
    normalizer = ObsNormalizer(spec.spaces().obs, clip=10.0) if config.normalize_obs else None
    stats = RunningStats(()) if config.normalize_reward else None
    # All samples train the predictor, for which of them do is random on each rank.
    rnd = RND(keep_fraction=1.0).build(spec.spaces(), torch.Generator().manual_seed(1))
    extensions = Extensions([rnd] if case == "extensions" else [])
    learner = Learner(
        spec,
        spec.build(CPU, rank),
        Agent(policy, normalizer, extensions),
        config,
        stats,
        exploration=torch.Generator(),
        sample_order=torch.Generator(),
        mode=mode,
        device=CPU,
        ranks=ranks,
    )
    optimizer = build_optimizer(policy, config, extensions)
    learner.start(optimizer, None)
    own = slice(rank * spec.num_envs, (rank + 1) * spec.num_envs)
    parts = everything(masked=case == "choices")._asdict().items()
    rollout = Rollout(**{name: None if v is None else v[:, own] for name, v in parts})
    targets = learner.compute_targets(rollout)
    if case != "memory":  # there a step takes everything
        learner._updater.order = lambda *_: shared_order(config, rank, size)
    metrics = learner.update(targets, learning_rate=config.learning_rate)
    if normalizer is not None:
        normalizer.update(rollout.obs, ranks)
    modules = {"policy": policy, "obs": normalizer, "return": stats, "extensions": extensions}
    return {
        "state": {n: m.state_dict() for n, m in modules.items() if m is not None},
        "gradient": {k: v["exp_avg"] / 0.1 for k, v in optimizer.state_dict()["state"].items()},
        "metrics": {**metrics._asdict(), "own": metrics.own._asdict()},
        "added": dict(targets.added),
        "episodes": tuple(targets.episodes),
        "explained": targets.explained_variance,
        "advantage": targets.samples.advantage.view(STEPS, -1),
        "gathered": [who.item() for who in ranks.gather(torch.tensor(rank))],
        "states": ranks.collect_states({"who": torch.tensor(rank)}),
    }


if __name__ == "__main__":
    rank, size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'meet'}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save({name: learn(rank, size, name) for name in CASES}, directory / f"{rank}.pt")
