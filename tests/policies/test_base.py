"""What every policy inherits, and what is no policy."""

import pytest
import torch
from torch import nn

from esper_lightning import MLP, PPO, policies
from esper_lightning.envs import CartPole
from esper_lightning.policies.base import Policy, PolicySpec

SPACES = CartPole().spaces()


class Builds(PolicySpec):
    """A spec that builds what it is given."""

    def __init__(self, built):
        self.built = built

    def build(self, spaces, generator):
        return self.built() if isinstance(self.built, type) else self.built


class Actor(nn.Module):
    """Half of a policy, which derives from no class of this package."""

    memory_size = 0

    def act(self, obs, mask, noise):
        raise NotImplementedError


class Half(Policy):
    """Half of a policy that derives from ``Policy``."""

    def noise(self, shape, generator):
        raise NotImplementedError

    act = act_deterministically = evaluate = noise


@pytest.mark.parametrize(("built", "message"), [
    (3, r"^Builds.build\(\) must return a Policy, which is an nn.Module, got int.$"),
    (Actor, r"^Builds.build\(\) must return a Policy, got Actor without initial_memory,"
     " step_memory, unroll_memory, reset_memory, noise, act_deterministically, evaluate,"
     " value, to_env.$"),
])  # fmt: skip
def test_what_is_no_policy_is_refused_before_anything_is_trained(built, message):
    with pytest.raises(ValueError, match=message):
        PPO(CartPole(num_envs=4), Builds(built))


def test_a_policy_that_lacks_methods_says_which():
    with pytest.raises(TypeError, match=r"class Half .*methods? '?to_env'?(,| and) '?value'?"):
        PPO(CartPole(num_envs=4), Builds(Half))


def test_a_policy_without_memory_gets_its_observations_and_carries_nothing():
    policy = MLP(hidden_sizes=(4,)).build(SPACES, torch.Generator().manual_seed(0))
    obs = torch.randn(3, 4)
    assert policy.memory_size == 0
    assert policy.initial_memory(obs) is None
    assert policy.step_memory(obs, None) == (obs, None)
    assert policy.unroll_memory(obs, None, None) == (obs, None)
    assert policy.reset_memory(None, torch.ones(3, dtype=torch.bool)) is None


def test_the_memory_of_episodes_that_ended_is_blank_and_that_of_others_stays():
    policy = MLP(hidden_sizes=(4,)).build(SPACES, torch.Generator().manual_seed(0))
    policy.memory_size = 2
    assert torch.equal(policy.initial_memory({"a": torch.ones(3, 4)}), torch.zeros(3, 2))
    memory = torch.arange(6.0).view(3, 2) + 1.0
    after = policy.reset_memory(memory, torch.tensor([False, True, False]))
    assert after.tolist() == [[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]]


def test_what_the_author_of_a_policy_needs_is_exported():
    names = {"ActorCritic", "Encoder", "EncoderSpec", "Policy", "PolicySpec", "build_actor_critic"}
    assert names <= set(policies.__all__)
    assert all(hasattr(policies, name) for name in policies.__all__)
