"""The policy of a checkpoint, as the commands that do not train it load it."""

import pytest

from esper_lightning import MLP, PPOConfig, train_ppo_vectorized
from esper_lightning.cli.errors import CommandParser
from esper_lightning.cli.policy import add_policy_option, load_policy
from esper_lightning.envs import CartPole
from esper_lightning.ppo.random_distillation import RND


def test_the_policy_of_a_run_directory_is_loaded_without_extensions(tmp_path):
    train_ppo_vectorized(
        CartPole(num_envs=4),
        iterations=1,
        ppo=PPOConfig(rollout_steps=4, minibatches=1, epochs=1),
        policy=MLP(hidden_sizes=(4,)),
        extensions=(RND(),),
        device="cpu",
        compile="off",
        run_dir=tmp_path,
    )
    path, model = load_policy(str(tmp_path))
    assert path == tmp_path / "checkpoints" / "last.ckpt"
    assert model.iteration == 1
    assert len(model.extensions) == 0


def test_the_option_must_be_given(capsys):
    parser = CommandParser("esper play", "Watch a policy.")
    add_policy_option(parser)
    assert parser.parse_args(["--ckpt_path", "run"]).ckpt_path == "run"
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "--ckpt_path" in capsys.readouterr().err
