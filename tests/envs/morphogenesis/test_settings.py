"""Settings that make no sense are refused at once, and by name."""

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
    """Without the type checks of the tests, which would be faster with another error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "0.1", None, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite(name, value):
    message = rf"^Morphogenesis\.{name} must be a finite number, got {value!r}\.$"
    with pytest.raises(ValueError, match=message):
        Morphogenesis(**{name: value})


@pytest.mark.parametrize("value", [8, (), (4, 0, 4), (4, 4.0, 4), (True, 1, 1), "448", None])
@pytest.mark.parametrize("name", ["channels", "kernels", "pools", "ramp_epochs", "image"])
def test_sizes_are_tuples_of_integers(name, value):
    message = rf"^Morphogenesis\.{name} must be a tuple of integers of at least 1, got "
    with pytest.raises(ValueError, match=message):
        Morphogenesis.synthetic(**{name: value})


@pytest.mark.parametrize("value", [3, (), "norm", ("norm", "norm"), None])
def test_blueprints_are_names(value):
    with pytest.raises(ValueError, match=r"^Morphogenesis\.blueprints must be different names"):
        Morphogenesis(blueprints=value)


def test_an_image_has_channels_and_a_side():
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
def test_real_images_are_as_they_are(settings, message):
    with pytest.raises(ValueError, match=message):
        Morphogenesis(**settings)


def test_what_is_so_anyway_may_be_said():
    assert Morphogenesis(image=(1, 8), classes=10) == Morphogenesis.digits()
    real, large = Morphogenesis.cifar10("x"), Morphogenesis.benchmark()
    assert real.image == large.image == (3, 32)
    assert Morphogenesis(dataset="cifar10", folder="x").architecture().image == (3, 32)
