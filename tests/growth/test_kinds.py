"""Outcomes by kind of host, and the schedule that is best for each kind."""

import numpy as np
import pytest
import torch

from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis.baselines import BASELINES, schedule
from esper_lightning.envs.morphogenesis.population import Population
from esper_lightning.growth.kinds import Outcome, best_for_kind, kind_names, kind_numbers
from esper_lightning.growth.play import fresh_hosts, play_baselines

CPU = torch.device("cpu")
SPEC = Morphogenesis.synthetic(
    image=(1, 4), channels=(4, 4), kernels=(3, 1), pools=(2, 1), classes=4, epochs=4,
    train_batches=2, batch_size=8, validation_size=64,
    population=Population(classes=(2, 4), label_noise=(0.0, 0.25), width=(0.5, 1.0)),
)  # fmt: skip


@pytest.fixture(scope="module")
def played():
    rules = {"never": BASELINES["never grow"], "norm": schedule(blueprint="norm", slots=(1,))}
    with fresh_hosts(SPEC, hosts=60, device=CPU, seed=3) as env:
        return dict(play_baselines(env, rules))


def test_a_kind_has_a_number_and_a_name(played):
    kinds = played["never"].kinds
    numbers, names = kind_numbers(kinds), kind_names(kinds)
    assert len(names) == 8
    assert names[0] == "2 classes, 0 % wrong labels, 50 % wide"
    for host, number in enumerate(numbers):
        noise, width = (100 * kinds[k][host].item() for k in (2, 5))
        assert kinds._fields[2] == "label_noise"
        assert kinds._fields[5] == "width"
        said = f"{kinds.classes[host]} classes, {noise:.0f} % wrong labels, {width:.0f} % wide"
        assert names[number] == said


def test_everyone_plays_hosts_of_the_same_kinds(played):
    kinds = [kind_numbers(one.kinds) for one in played.values()]
    assert np.array_equal(*kinds)
    assert len(set(kinds[0])) == 8


def test_an_outcome_has_a_row_for_each_policy(played):
    never, norm = (Outcome.of([one]) for one in played.values())
    both = Outcome.of([*played.values()])
    assert both.episode_return.shape == (2, 60)
    assert np.array_equal(both.grows, [[0] * 60, [1] * 60])
    assert (never.grown_parameters == 0).all()
    assert (norm.grown_parameters == 8).all()
    odd = np.arange(60) % 2
    chosen = both.choose(odd)
    for field, first, second in zip(chosen, never, norm, strict=True):
        assert np.array_equal(field, np.where(odd == 1, second, first))


SCORE = np.array(
    [
        # two kinds: what is best for most of a kind, and for its last host alone
        [1.0, 1.0, 0.0, 5.0, 5.0, 5.0],
        [2.0, 2.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 9.0, 4.0, 4.0, 4.0],
    ]
)
KIND = np.array([0, 0, 0, 1, 1, 1])


def test_the_best_schedule_of_a_kind_has_the_highest_mean_over_its_hosts():
    assert best_for_kind(SCORE, KIND).tolist() == [2, 2, 2, 0, 0, 0]


def test_chosen_on_other_hosts_the_host_itself_does_not_count():
    chosen = best_for_kind(SCORE, KIND, without_itself=True)
    assert chosen.tolist() == [2, 2, 1, 0, 0, 0]
    changed = SCORE.copy()
    changed[:, 2] = 100 * np.array([0.0, 1.0, 2.0])
    again = best_for_kind(changed, KIND, without_itself=True)
    assert again[2] == 1
