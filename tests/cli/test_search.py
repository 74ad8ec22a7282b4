"""Settings and values of a search are read as they are meant, or refused in a line."""

import pytest

from esper_lightning.cli.search import Dimension, parse_dimension


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.ppo.epochs=2..8", Dimension("model.ppo.epochs", 2, 8)),
        ("model.ppo.clip=0.1..1", Dimension("model.ppo.clip", 0.1, 1.0)),
        ("model.ppo.clip = 1e-4..1e-2 log", Dimension("model.ppo.clip", 1e-4, 1e-2, is_log=True)),
        ("model.ppo.a=-1..2.5", Dimension("model.ppo.a", -1.0, 2.5)),
        ("model.compile=[off, auto]", Dimension("model.compile", choices=("off", "auto"))),
        ("model.ppo.lr=[1e-3, 2]", Dimension("model.ppo.lr", choices=("1e-3", "2"))),
        (
            "model.policy.hidden_sizes=[[64, 64], [128]]",
            Dimension("model.policy.hidden_sizes", choices=("[64, 64]", "[128]")),
        ),
    ],
)
def test_what_is_searched(text, expected):
    found = parse_dimension(text)
    assert found == expected
    assert [*map(type, found)] == [*map(type, expected)]  # integers are sampled as integers


def test_a_range_becomes_a_distribution_of_its_numbers():
    assert parse_dimension("model.a=1..4").distribution()._contains(4)
    assert not parse_dimension("model.a=1..4").distribution()._contains(5)
    assert parse_dimension("model.a=1.0..4 log").distribution().log
    assert parse_dimension("model.a=[x, y]").distribution().choices == ("x", "y")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model.ppo.clip", "--search model.ppo.clip must be NAME=LOW..HIGH"),
        ("clip=1..2", "--search must be NAME=LOW..HIGH"),
        ("model.ppo.clip=3..1", "--search model.ppo.clip must have a LOW below its HIGH"),
        ("model.ppo.clip=0..1 log", "must be positive where it is logarithmic"),
        ("model.ppo.clip=[1]", "must have two or more choices, each once"),
        ("model.ppo.clip=[1, 1]", "must have two or more choices, each once"),
        ("model.ppo.clip=[1", "must be NAME=LOW..HIGH"),
        ("model.env.num_envs=1..9", "Runs that are compared have one environment and one budget."),
        ("model.total_env_steps=1..9", "--search must name a setting that may differ"),
        ("model.seed=1..9", "--search must name a setting that may differ"),
    ],
)
def test_what_cannot_be_searched(text, says):
    with pytest.raises(ValueError, match="--search") as caught:
        parse_dimension(text)
    assert says in str(caught.value)
