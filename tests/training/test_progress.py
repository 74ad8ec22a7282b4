"""Counters of a run, its budget, and the rows of its history."""

import pytest

from esper_lightning import PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.training.progress import Progress
from esper_lightning.training.settings import PPOSettings

METRICS = {
    "healthy": 1.0,
    "return_sum": 30.0,
    "length_sum": 20.0,
    "episodes": 2.0,
    "loss/value": 0.5,
    "gradient_steps": 6.0,
}


def progress(budget: int | None = None) -> Progress:
    config = PPOConfig(rollout_steps=8, minibatches=2)
    return Progress(PPOSettings(env=CartPole(num_envs=4), ppo=config, total_env_steps=budget))


@pytest.mark.parametrize(
    ("budget", "env_steps", "ranks", "steps"),
    [
        (None, 10**9, 3, 8),
        (1000, 0, 1, 8),
        (1000, 968, 1, 8),
        (1000, 972, 1, 7),
        (1000, 996, 1, 1),
        (1000, 997, 1, 0),
        (1000, 1000, 1, 0),
        (1000, 2000, 1, 0),
        (1000, 976, 2, 3),
    ],
)
def test_the_budget_shortens_the_last_rollout_and_is_never_exceeded(
    budget, env_steps, ranks, steps
):
    run = progress(budget)
    run.env_steps = env_steps
    assert run.next_rollout_steps(ranks) == steps


def test_a_finished_iteration_is_counted_and_is_a_row():
    run = progress()
    run.finish_iteration(METRICS, env_steps=32, duration_s=0.5)
    row = run.finish_iteration(METRICS, env_steps=16, duration_s=0.25)
    assert row == {
        "iteration": 2,
        "env_steps": 48,
        "gradient_steps": 12,
        "time_s": 0.75,
        "env_steps_per_s": 64.0,
        "rollout/episode_return_mean": 15.0,
        "rollout/episode_length_mean": 10.0,
        "rollout/episodes": 2,
        "loss/value": 0.5,
    }


@pytest.mark.parametrize(
    ("earlier", "episodes", "warns"),
    [(2.0, 32.0, 1), (2.0, 31.0, 0), (32.0, 32.0, 0), (0.0, 32.0, 0)],
)
def test_episodes_that_end_at_every_step_are_told_once(caplog, earlier, episodes, warns):
    run = progress()
    for count in (earlier, episodes, episodes):
        metrics = {**METRICS, "episodes": count, "length_sum": max(count, 20.0)}
        run.finish_iteration(metrics, env_steps=32, duration_s=1.0)
    assert caplog.text.count("lasted one step") == warns


def test_only_the_first_row_after_a_resumption_says_that_episodes_began_anew():
    run = progress()
    run.new_episodes = True
    rows = [run.finish_iteration(METRICS, env_steps=32, duration_s=1.0) for _ in range(2)]
    assert [row.get("resumed_with_new_episodes") for row in rows] == [1, None]


def test_the_share_that_is_done_needs_a_planned_end_and_is_at_most_1():
    run = progress()
    run.env_steps = 30
    assert run.done_share() == 0.0
    run.planned_env_steps = 120
    assert run.done_share() == 0.25
    run.planned_env_steps = 20
    assert run.done_share() == 1.0


def test_a_checkpoint_continues_the_counters():
    run, resumed = progress(), progress()
    run.finish_iteration(METRICS, env_steps=32, duration_s=0.5)
    resumed.load_state_dict(run.state_dict())
    assert resumed.state_dict() == run.state_dict()
    none = {**METRICS, "episodes": 0.0, "return_sum": 0.0, "length_sum": 0.0}
    rows = [each.finish_iteration(none, env_steps=32, duration_s=0.5) for each in (run, resumed)]
    assert rows[0] == rows[1]
    assert rows[1]["rollout/episode_return_mean"] == 15.0
