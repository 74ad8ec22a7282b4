"""Settings of PPO at the ends of their ranges."""

import dataclasses
import math

import pytest

from esper_lightning import PPOConfig


@pytest.mark.parametrize(
    "settings",
    [
        {"discount": 0.0, "gae_lambda": 0.0},
        {"discount": 1.0, "gae_lambda": 1.0},
        {"value_coef": 0.0, "entropy_coef": 0.0},
        {"rollout_steps": 1, "epochs": 1, "minibatches": 1},
        {"value_clip": None, "max_grad_norm": None, "target_kl": None},
    ],
    ids=str,
)
def test_a_value_at_the_end_of_its_range_is_accepted(settings):
    assert dataclasses.asdict(PPOConfig(**settings)).items() >= settings.items()


POSITIVE = ("learning_rate", "desired_kl", "adam_eps", "obs_clip", "reward_clip")
OPTIONAL = ("value_clip", "max_grad_norm", "target_kl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("discount", "gae_lambda") for value in (-0.1, 1.1, math.nan)),
        *(("clip", value) for value in (0.0, 1.0, math.nan)),
        *((name, value) for name in ("value_coef", "entropy_coef") for value in (-0.1, math.inf)),
        *((name, value) for name in (*POSITIVE, *OPTIONAL) for value in (0.0, -1.0, math.inf)),
        *((n, value) for n in ("rollout_steps", "epochs", "minibatches") for value in (0, 1.5)),
        ("learning_rate_schedule", "cosine"),
    ],
)
def test_a_value_beyond_its_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^PPOConfig\.{name} must .*, got {value!r}\."):
        PPOConfig(**{name: value})
