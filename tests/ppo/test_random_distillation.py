"""Random network distillation: its reward, its loss, and a task that needs it."""

import pytest
import torch

from esper_lightning import MLP, PPO, RND, PPOConfig
from esper_lightning.core.ranks import SINGLE_RANK
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.envs import MountainCar
from tests.ppo.test_extension import ENVS, SPEC, STEPS, history, make


@pytest.mark.parametrize("wrong", [{"keep_fraction": 0.0}, {"coefficient": 0.0}, {"discount": 1.0}])
def test_settings_are_checked(wrong) -> None:
    with pytest.raises(ValueError, match=f"RND.{next(iter(wrong))} must"):
        RND(**wrong)


def test_rnd_sees_images_of_bytes_as_numbers() -> None:
    spaces = EnvSpaces(obs=Box((1, 4, 4), 0.0, 255.0, dtype="uint8"), action=Discrete(2))
    extension = RND(hidden_sizes=(8,)).build(spaces, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    obs = torch.randint(0, 256, (8, 4, 1, 4, 4), generator=generator, dtype=torch.uint8)
    learner = make()
    rollout = learner.rollout(STEPS)._replace(obs=obs, reached_obs=obs)
    arguments = {"healthy": torch.tensor(True), "ranks": SINGLE_RANK, "generator": generator}
    kept = extension.prepare(rollout, **arguments).kept
    assert kept[0].mean().abs() < 1e-3
    assert 0.9 < kept[0].std() < 1.1


def test_statistics_stay_as_they_are_where_a_rollout_is_not_finite() -> None:
    learner = make(RND().build(SPEC.spaces(), torch.Generator().manual_seed(5)))
    before = {k: v.clone() for k, v in learner.agent.extensions.state_dict().items()}
    rollout = learner.rollout(STEPS)
    rollout.reached_obs[3, 1] = torch.nan
    learner.compute_targets(rollout)
    after = learner.agent.extensions.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def make_rnd(**settings):
    return make(RND(**settings).build(SPEC.spaces(), torch.Generator().manual_seed(5)))


def test_rnd_rewards_errors_by_their_discounted_sums_and_trains_on_a_share() -> None:
    learner = make_rnd(coefficient=3.0, discount=0.5)
    (rnd,) = learner.agent.extensions
    sums, running = [], torch.zeros(ENVS)
    for _ in range(3):
        rollout = learner.rollout(STEPS)
        predictor = {k: v.clone() for k, v in rnd.predictor.state_dict().items()}
        targets = learner.compute_targets(rollout)
        obs, target, trains = targets.samples.kept[0]
        seen = rollout.reached_obs.flatten(0, 1)
        assert obs.abs().max() <= 5.0
        stats = rnd.normalizer._of("obs")
        expected = (seen - stats.mean) / stats.variance.sqrt()
        torch.testing.assert_close(obs, expected.clamp(-5, 5).float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(target, rnd.target(obs))
        rnd.predictor.load_state_dict(predictor)
        error = (rnd.predictor(obs) - target).square().mean(-1).detach().view(STEPS, ENVS)
        for t in range(STEPS):
            running = 0.5 * running + error[t]
            sums.append(running)
        deviation = torch.stack(sums).std(correction=0)
        torch.testing.assert_close(targets.added["rnd/reward"], 3.0 * error.mean() / deviation)
        running = torch.full((ENVS,), torch.stack(sums).mean().item())
        update = learner.update(targets, learning_rate=1e-3)
        assert 0.0 < trains.float().mean() < 0.6
        assert update.added["rnd"] > 0.0
    assert not any(weight.requires_grad for weight in rnd.target.parameters())


def test_the_predictor_learns_and_the_target_stays() -> None:
    learner = make_rnd(keep_fraction=1.0)
    (rnd,) = learner.agent.extensions
    target = {k: v.clone() for k, v in rnd.target.state_dict().items()}
    losses = []
    for _ in range(30):
        targets = learner.compute_targets(learner.rollout(STEPS))
        losses.append(learner.update(targets, learning_rate=3e-3).added["rnd"].item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(v, target[k]) for k, v in rnd.target.state_dict().items())


def reaches_the_goal(make_trainer, seed, extensions) -> bool:
    """Whether one mountain car, which gets no hint of the goal, is there within 61,440 steps."""
    ppo = PPOConfig(rollout_steps=1024, normalize_obs=True)
    model = PPO(
        MountainCar(num_envs=1), MLP(), ppo, seed,
        total_env_steps=61_440, extensions=extensions,
    )  # fmt: skip
    rows = history(model, make_trainer())
    means = [row["rollout/episode_return_mean"] for row in rows]
    return any(mean is not None and mean > -200.0 for mean in means)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rnd_climbs_the_mountain_with_one_car_where_plain_ppo_never_does(
    make_trainer, seed
) -> None:
    """With ``RND`` the seeds 0, 1 and 2 reach the goal after 21,504, 25,600 and 40,960 steps."""
    assert not reaches_the_goal(make_trainer, seed, ())
    assert reaches_the_goal(make_trainer, seed, (RND(coefficient=30.0),))
