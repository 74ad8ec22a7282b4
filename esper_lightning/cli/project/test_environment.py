"""The environment keeps the contract, and PPO learns in it."""

from environment import Reach

from esper_lightning import PPOConfig, check_env, train_ppo_vectorized


def test_the_environment_keeps_the_contract():
    check_env(Reach(num_envs=4))


def test_ppo_learns_to_reach_the_target(tmp_path):
    history = train_ppo_vectorized(
        Reach(num_envs=64),
        iterations=40,
        ppo=PPOConfig(rollout_steps=50, learning_rate=1e-3),
        run_dir=str(tmp_path / "run"),
    )
    first, last = (row["rollout/episode_return_mean"] for row in (history[0], history[-1]))
    assert last > 0.6 * first  # returns are negative: the distances summed over an episode
