"""The package as a whole: what it exports, and what it needs."""

import subprocess
import sys

import pytest

import esper_lightning

TRAIN = """
import sys
for name in ("jaxtyping", "jsonargparse", "beartype", "gymnasium", "stable_baselines3"):
    sys.modules[name] = None  # importing it raises ImportError
from esper_lightning import MLP, PPOConfig, check_env, train_ppo_vectorized
from esper_lightning.envs import CartPole, Pendulum
check_env(CartPole(num_envs=4))
ppo = PPOConfig(rollout_steps=8, minibatches=2)
rows = train_ppo_vectorized(Pendulum(num_envs=4), iterations=2, ppo=ppo, run_dir=sys.argv[1])
assert [row["iteration"] for row in rows] == [1, 2]
print("trained")
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", esper_lightning.__all__)
def test_every_export_exists(name):
    assert getattr(esper_lightning, name).__name__ == name
    assert name in dir(esper_lightning)


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'PPOO'"):
        _ = esper_lightning.PPOO


def test_trains_with_the_least_that_it_needs(tmp_path):
    result = run(TRAIN, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("trained\n")


def test_reading_the_remains_of_a_run_needs_no_torch(tmp_path):
    code = (
        "import sys, esper_lightning\n"
        "from esper_lightning.forensics import files, layout\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
