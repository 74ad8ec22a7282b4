"""Means over recent episodes, and metrics of a rollout."""

import math

import pytest
import torch

from esper_lightning.core.buffer import allocate_rollout
from esper_lightning.core.ranks import SINGLE_RANK, Ranks
from esper_lightning.envs import CartPole
from esper_lightning.ppo.metrics import (
    RecentEpisodes,
    evaluation_metrics,
    mean_env_metrics,
    sum_episodes,
    to_host,
)


def test_the_latest_iterations_that_hold_the_window_count_and_no_earlier_one():
    recent = RecentEpisodes(window=4)
    recent.update(1000.0, 1000.0, 2.0)
    recent.update(3.0, 6.0, 3.0)
    recent.update(5.0, 10.0, 1.0)  # with the three before it, these are four
    assert recent.means() == (2.0, 4.0)
    recent.update(0.0, 0.0, 1.0)  # one and one, and the three before them
    assert recent.means() == (8.0 / 5, 16.0 / 5)


def test_with_fewer_episodes_than_the_window_all_there_are_count():
    recent = RecentEpisodes(window=100)
    assert all(math.isnan(mean) for mean in recent.means())
    recent.update(6.0, 30.0, 3.0)
    assert recent.means() == (2.0, 10.0)


@pytest.mark.parametrize("resumed", [False, True])
def test_at_most_64_iterations_in_which_an_episode_ended_are_stored(resumed):
    recent = RecentEpisodes(window=10**9)
    if resumed:
        recent.load([])
    for number in range(100):
        recent.update(float(number), 1.0, 1.0)
        recent.update(0.0, 0.0, 0.0)
    assert recent.means() == (sum(range(36, 100)) / 64, 1.0)
    assert len(recent.state()) == 64


def rollout():
    storage = allocate_rollout(CartPole().spaces(), 3, 2, device=torch.device("cpu"))
    storage.episode_return.fill_(math.nan)
    storage.episode_length.zero_()
    return storage


def test_returns_are_summed_over_the_episodes_that_ended():
    storage = rollout()
    storage.episode_return[1, 0], storage.episode_length[1, 0] = 3.0, 5
    storage.episode_return[2, 1], storage.episode_length[2, 1] = -1.0, 7
    assert sum_episodes(storage) == (2.0, 12.0, 2.0)
    storage.episode_return[0, 1], storage.episode_length[0, 1] = math.nan, 1
    assert sum_episodes(storage).episode_return.isnan()  # of an episode that ended: no number


def test_sums_over_many_episodes_are_not_rounded():
    storage = rollout()
    storage.episode_return[0, 0], storage.episode_length[0, 0] = 2.0**24, 2**24
    storage.episode_return[1, 0], storage.episode_length[1, 0] = 1.0, 1
    sums = sum_episodes(storage)
    assert sums == (2.0**24 + 1, 2**24 + 1, 2.0)
    numbers = to_host({"healthy": torch.tensor(True), "return_sum": sums.episode_return})
    assert numbers == {"healthy": 1.0, "return_sum": 2.0**24 + 1}


def test_evaluation_metrics_are_means_over_the_episodes():
    metrics = evaluation_metrics(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]))
    assert metrics == {
        "eval/episode_return_mean": 2.0,
        "eval/episode_return_std": 1.0,
        "eval/episode_length_mean": 3.0,
        "eval/episodes": 2.0,
    }
    assert evaluation_metrics(*torch.ones(2, 1))["eval/episode_return_std"] == 0.0


class Late:
    """Environments that have logged some metrics, under names that nobody knew before."""

    names_come_late = True

    def __init__(self, logged):
        self._logged = logged

    def reset(self):
        raise NotImplementedError

    step = state_dict = load_state_dict = reset

    def metrics(self):
        return {name: torch.tensor(value) for name, value in self._logged.items()}


class Beside(Ranks):
    """Two ranks, of which the second has logged ``theirs``."""

    def __init__(self, theirs):
        super().__init__(2)
        self._theirs = theirs

    def gather_objects(self, mine):
        return [mine, self._theirs]


def test_metrics_that_only_some_ranks_know_are_means_over_those_that_know_them():
    env, cpu = Late({"a": 1.0, "b": 2.0, "d": math.nan}), torch.device("cpu")
    ranks = Beside({"a": 3.0, "c": 5.0, "b": math.nan, "d": math.nan})
    means = mean_env_metrics(env, ranks, device=cpu)
    assert {name: means[name].item() for name in "abc"} == {"a": 2.0, "b": 2.0, "c": 5.0}
    assert means["d"].isnan()
    alone = mean_env_metrics(env, SINGLE_RANK, device=cpu)
    assert [value.item() for value in alone.values()][:2] == [1.0, 2.0]


def test_environments_without_metrics_have_none():
    env = CartPole(num_envs=2).build(torch.device("cpu"), 0)
    assert mean_env_metrics(env, SINGLE_RANK, device=torch.device("cpu")) == {}
