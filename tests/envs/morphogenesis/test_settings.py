"""Settings that make no sense are refused at once, with the name of the setting."""

import math

import jaxtyping
import pytest

from esper_lightning.envs.morphogenesis import Morphogenesis

NUMBERS = (
    *("noise", "learning_rate", "momentum", "weight_decay", "max_grad_norm"),
    *("gain_weight", "rent_weight", "intervention_cost", "divergence_penalty"),
    *("shaping_weight", "shaping_discount"),
)


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Switches off the type checks of the test run, which would raise another error first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "0.1", None, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_not_finite_are_refused(name, value):
    message = rf"^Morphogenesis\.{name} must be a finite number, got {value!r}\.$"
    with pytest.raises(ValueError, match=message):
        Morphogenesis(**{name: value})


@pytest.mark.parametrize("value", [8, (), (4, 0, 4), (4, 4.0, 4), (True, 1, 1), "448", None])
@pytest.mark.parametrize("name", ["channels", "kernels", "pools", "ramp_epochs", "image"])
def test_sizes_that_are_no_tuples_of_integers_are_refused(name, value):
    message = rf"^Morphogenesis\.{name} must be a tuple of integers of at least 1, got "
    with pytest.raises(ValueError, match=message):
        Morphogenesis.synthetic(**{name: value})


@pytest.mark.parametrize("value", [3, (), "norm", ("norm", "norm"), None])
def test_blueprints_that_are_no_names_are_refused(value):
    with pytest.raises(ValueError, match=r"^Morphogenesis\.blueprints must be different names"):
        Morphogenesis(blueprints=value)


def test_an_image_that_is_not_channels_and_side_is_refused():
    with pytest.raises(ValueError, match=r"image must be channels and side, got \(1, 8, 8\)\."):
        Morphogenesis.synthetic(image=(1, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image": (2, 8)},
            r"image must be \(1, 8\) for 'digits', got \(2, 8\)\. Only 'synthetic'",
        ),
        ({"classes": 5}, r"classes must be 10 for 'digits', got 5\. Only 'syn"),
        (
            {"dataset": "cifar10", "folder": "x", "image": (3, 16)},
            r"image must be \(3, 32\) for 'cifar10', got \(3, 16\)\.",
        ),
    ],
)
def test_settings_that_contradict_the_data_set_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Morphogenesis(**settings)


def test_settings_that_repeat_those_of_the_data_set_are_accepted():
    assert Morphogenesis(image=(1, 8), classes=10) == Morphogenesis.digits()
    real, large = Morphogenesis.cifar10("x"), Morphogenesis.benchmark()
    assert real.image == large.image == (3, 32)
    assert Morphogenesis(dataset="cifar10", folder="x").architecture().image == (3, 32)
