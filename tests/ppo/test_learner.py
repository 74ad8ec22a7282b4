"""The stages of an iteration together: what they pass to the next stage and to other ranks."""

import dataclasses

import pytest
import torch
from torch import Tensor

from esper_lightning import MLP, PPOConfig
from esper_lightning.core.ranks import SINGLE_RANK, Ranks
from esper_lightning.core.running_stats import RunningStats
from esper_lightning.core.tensor_trees import leaves, map_tree
from esper_lightning.envs import CartPole, Pendulum
from esper_lightning.envs.autoreset import AutoresetEnv
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.optimizer import build_optimizer

CPU = torch.device("cpu")
STEPS, ENVS = 8, 3
CONFIG = PPOConfig(rollout_steps=STEPS, minibatches=2, epochs=1, normalize_reward=True)


def make(ranks: Ranks = SINGLE_RANK, config: PPOConfig = CONFIG, *, freeze: str = "") -> Learner:
    spec = CartPole(num_envs=ENVS, time_limit=5)
    policy = MLP(hidden_sizes=(8,)).build(spec.spaces(), torch.Generator().manual_seed(0))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(not freeze or not name.startswith(freeze))
    learner = Learner(
        spec,
        spec.build(CPU, 1),
        Agent(policy, None),
        config,
        RunningStats(()),
        exploration=torch.Generator().manual_seed(2),
        sample_order=torch.Generator().manual_seed(3),
        mode="off",
        device=CPU,
        ranks=ranks,
    )
    learner.start(build_optimizer(policy, config), None)
    return learner


def policy_of(learner: Learner) -> torch.nn.Module:
    return learner.agent.policy


def test_discounted_returns_span_rollouts_and_end_with_their_episode() -> None:
    learner = make()
    running, returns = torch.zeros(ENVS), []
    for _ in range(3):
        rollout = learner.rollout(STEPS)
        ended = rollout.terminated | rollout.truncated
        assert ended.any()
        for t in range(STEPS):
            running = CONFIG.discount * running + rollout.reward[t]
            returns.append(running.clone())
            running[ended[t]] = 0.0
        learner.compute_targets(rollout)
        torch.testing.assert_close(learner._acting.discounted_return, running)
        stats, expected = learner._return_stats, torch.stack(returns).double()
        assert stats.count == expected.numel()
        torch.testing.assert_close(stats.mean, expected.mean(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats.variance, expected.var(correction=0), rtol=1e-5, atol=1e-6)


def test_weights_that_other_code_sets_act_and_learn() -> None:
    learner, other = make(), make()
    for one, replaces in ((learner, True), (other, False)):
        for parameter in policy_of(one).parameters():
            if replaces:
                parameter.data = 2.0 * parameter.data
            else:
                parameter.data.mul_(2.0)
        rollout = one.rollout(STEPS)
        one.update(one.compute_targets(rollout), learning_rate=1e-2)
    for mine, theirs in zip(
        policy_of(learner).parameters(), policy_of(other).parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_environments_are_given_actions_within_their_range() -> None:
    spec = Pendulum(num_envs=ENVS)
    policy = MLP(initial_std=5.0).build(spec.spaces(), torch.Generator().manual_seed(0))
    env, given = spec.build(CPU, 1), []
    step = env.step
    env.step = lambda action: given.append(action) or step(action)
    streams = {
        "exploration": torch.Generator().manual_seed(2),
        "sample_order": torch.Generator().manual_seed(3),
    }
    agent = Agent(policy, None)
    learner = Learner(spec, env, agent, CONFIG, None, **streams, mode="off", device=CPU)
    learner.start(build_optimizer(policy, CONFIG), None)
    drawn = learner.rollout(STEPS).action
    for action, taken in zip(drawn, given, strict=True):
        assert torch.equal(policy.to_env(action), taken)
    assert torch.stack(given).abs().max() <= 2.0
    assert drawn.abs().max() > 2.0


def test_frozen_weights_stay() -> None:
    learner = make(freeze="critic")
    before = {name: value.clone() for name, value in policy_of(learner).state_dict().items()}
    learner.update(learner.compute_targets(learner.rollout(STEPS)), learning_rate=1e-2)
    for name, value in policy_of(learner).state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("critic"), name


def test_a_saved_state_shares_no_memory_with_the_running_one() -> None:
    learner = make()
    learner.rollout(STEPS)
    saved = learner.state_dict()
    kept = map_tree(torch.clone, saved)
    for buffer in leaves(learner._acting):
        buffer.add_(1)
    learner.rollout(STEPS)
    for one, other in zip(leaves(saved), leaves(kept), strict=True):
        assert torch.equal(one, other)


# Two ranks that share results, in one process.


class Twins(Ranks):
    """Two ranks, of which the second sends ``other`` applied to what this rank sends."""

    def __init__(self, other=lambda leaf: leaf) -> None:
        super().__init__(2)
        self.other = other

    def sum(self, tree):
        return map_tree(lambda leaf: leaf + self.other(leaf), tree)

    def gather(self, tree):
        return [tree, map_tree(self.other, tree)]


def test_a_rollout_that_is_broken_on_one_rank_is_broken_on_all() -> None:
    def broken(leaf: Tensor) -> Tensor:
        return torch.zeros_like(leaf) if leaf.dtype == torch.bool else leaf

    learner = make(Twins(broken))
    targets = learner.compute_targets(learner.rollout(STEPS))
    assert not targets.healthy
    assert learner._return_stats.count == 0
    before = [parameter.clone() for parameter in policy_of(learner).parameters()]
    learner.update(targets, learning_rate=1e-2)
    for mine, old in zip(policy_of(learner).parameters(), before, strict=True):
        assert torch.equal(mine, old)


def test_shared_statistics_are_those_of_both_ranks() -> None:
    config = dataclasses.replace(CONFIG, normalize_advantage=False)
    alone, two = make(config=config), make(Twins(), config)
    one, both = (learner.compute_targets(learner.rollout(STEPS)) for learner in (alone, two))
    assert both.healthy
    assert both.episodes == tuple(2 * total for total in one.episodes)
    assert two._return_stats.count == 2 * alone._return_stats.count
    torch.testing.assert_close(both.explained_variance, one.explained_variance)
    for learner, targets in ((alone, one), (two, both)):
        learner.update(targets, learning_rate=1e-2)
    weights = (policy_of(learner).parameters() for learner in (alone, two))
    for mine, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_metrics_of_environments_are_means_over_ranks() -> None:
    learner = make(Twins(lambda leaf: leaf + 2.0))

    class Reports:
        def reset(self, *_: object) -> None:
            raise NotImplementedError

        step = state_dict = load_state_dict = reset

        def metrics(self) -> dict[str, Tensor]:
            return {"a": torch.tensor(1.0), "b": torch.tensor(5.0)}

    learner._env = Reports()
    assert learner.env_metrics() == {"a": 2.0, "b": 6.0}


@pytest.mark.parametrize(("state", "got"), [
    ({"steps": 3}, r"got \{'steps': int\}"),
    ({"sim": {"x": torch.zeros(2)}}, r"got \{'sim': dict\}"),
    ([torch.zeros(2)], "got 'list'"),
], ids=["number", "nested", "list"])  # fmt: skip
def test_environments_whose_state_no_checkpoint_can_hold_are_refused_before_they_train(
    state, got, monkeypatch
) -> None:
    monkeypatch.setattr(AutoresetEnv, "state_dict", lambda self: state)
    with pytest.raises(ValueError, match=rf"state_dict\(\) must hold tensors only.*{got}"):
        make()
