"""Training on images of bytes is training on the same images in floats, in less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper_lightning import CNN, MLP, PPOConfig, Recurrent
from esper_lightning.compiling.loops import CompileMode
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.core.last_obs import with_reached_obs
from esper_lightning.core.running_stats import ObsNormalizer
from esper_lightning.core.tensor_trees import leaves
from esper_lightning.core.types import Observation
from esper_lightning.policies import PolicySpec
from esper_lightning.ppo import advantages
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.extension import Extensions
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.optimizer import build_optimizer
from esper_lightning.ppo.random_distillation import RND
from tests.envs.pictures import Pictures

CPU = torch.device("cpu")
STEPS = 16
CONFIG = PPOConfig(rollout_steps=STEPS, minibatches=2, epochs=2)


def make(
    spec: Pictures,
    policy: PolicySpec = MLP(hidden_sizes=(4,), activation="relu"),  # noqa: B008
    *,
    exact: bool = False,
    plain: bool = False,
    normalize: bool = False,
    mode: CompileMode = "off",
    extensions: Extensions | None = None,
) -> Learner:
    built = policy.build(spec.spaces(), torch.Generator().manual_seed(0))
    if exact:  # sums of such products are the same numbers in any order
        for parameter in built.parameters():
            parameter.data = (parameter.data * 8.0).round() / 8.0
    else:
        built.get_parameter(next(iter(built.state_dict()))).data.mul_(0.01)
    normalizer = ObsNormalizer(spec.spaces().obs, clip=10.0) if normalize else None
    env = spec.build(CPU, 1)
    if plain:
        env.step = env.step  # which makes it an environment that is stepped from Python
    learner = Learner(
        spec,
        env,
        Agent(built, normalizer, extensions),
        CONFIG,
        None,
        exploration=torch.Generator().manual_seed(2),
        sample_order=torch.Generator().manual_seed(3),
        mode=mode,
        device=CPU,
    )
    learner.start(build_optimizer(built, CONFIG, extensions), None)
    return learner


def floats(obs: Observation) -> list[Tensor]:
    return [leaf.float() for leaf in leaves(obs)]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("last_places", [0, 5, 97])  # of 97: with 97 every step ends an episode
def test_advantages_are_those_of_floats(
    monkeypatch: pytest.MonkeyPatch, plain: bool, grouped: bool, last_places: int
) -> None:
    monkeypatch.setitem(advantages._PIECE_BYTES, "cpu", 700)  # several pieces, of unequal size
    settings: dict[str, Any] = {"grouped": grouped, "last_places": last_places}
    of_bytes = make(Pictures(**settings), exact=True, plain=plain)
    of_floats = make(Pictures(**settings, dtype="float32"), exact=True, plain=plain)
    for _ in range(3):
        rollout, dense = of_bytes.rollout(STEPS), of_floats.rollout(STEPS)
        assert rollout.reached_obs == {}
        restored = with_reached_obs(rollout)
        for field in ("obs", "reached_obs"):
            for mine, theirs in zip(
                floats(getattr(restored, field)), floats(getattr(dense, field)), strict=True
            ):
                assert torch.equal(mine, theirs)
        mine, theirs = of_bytes.compute_targets(rollout), of_floats.compute_targets(dense)
        assert torch.equal(mine.samples.advantage, theirs.samples.advantage)
        assert torch.equal(mine.samples.value_target, theirs.samples.value_target)
        assert mine.healthy
        assert mine.explained_variance == theirs.explained_variance


class Largest(TorchDispatchMode):
    """Finds the largest tensor of floats that an operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_no_float_copy_of_a_rollout_is_made_before_the_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(advantages._PIECE_BYTES, "cpu", 2**14)
    learner = make(Pictures(shape=(1, 16, 16), num_envs=8))
    rollout = learner.rollout(STEPS)
    assert rollout.obs.nbytes == 8 * STEPS * 256
    with Largest() as largest:
        targets = learner.compute_targets(rollout)
    assert largest.nbytes <= 2**14
    assert targets.samples.obs.data_ptr() == rollout.obs.data_ptr()


def test_the_update_is_that_of_floats() -> None:
    """Normalised observations, too; the history of weights is that of the same floats."""
    for normalize in (False, True):
        learners = [
            make(Pictures(dtype=dtype, grouped=True), normalize=normalize)
            for dtype in ("uint8", "float32")
        ]
        for _ in range(3):
            for learner in learners:
                rollout = learner.rollout(STEPS)
                learner.update(learner.compute_targets(rollout), learning_rate=1e-3)
                if learner.agent.normalizer is not None:
                    learner.agent.normalizer.update(rollout.obs)
        for mine, theirs in zip(
            *(learner.agent.state_dict().values() for learner in learners), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_memory_is_that_of_floats(monkeypatch: pytest.MonkeyPatch, cell: Any) -> None:
    monkeypatch.setitem(advantages._PIECE_BYTES, "cpu", 3 * STEPS * 25 * 4)  # 3 of 4 environments
    policy = Recurrent(cell=cell, memory_size=8, encoder_sizes=(8,), hidden_sizes=(8,))
    learners = [make(Pictures(dtype=dtype), policy) for dtype in ("uint8", "float32")]
    for _ in range(3):
        samples = []
        for learner in learners:
            rollout = learner.rollout(STEPS)
            assert (rollout.terminated | rollout.truncated)[:-1].any()
            targets = learner.compute_targets(rollout)
            samples.append(targets.samples)
            learner.update(targets, learning_rate=1e-3)
        torch.testing.assert_close(samples[0].advantage, samples[1].advantage, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(samples[0].value, samples[1].value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("native_code")
def test_compiled_training_is_eager_training() -> None:
    policy = CNN(channels=(4,), kernels=(3,), strides=(1,), hidden_sizes=(8,))
    learners = [make(Pictures(last_places=20), policy, mode=each) for each in ("off", "auto")]
    for _ in range(2):
        for learner in learners:
            targets = learner.compute_targets(learner.rollout(STEPS))
            learner.update(targets, learning_rate=1e-3)
    for mine, theirs in zip(*(learner.agent.parameters() for learner in learners), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_extensions_see_what_every_step_reached() -> None:
    spec, rewards = RND(hidden_sizes=(8,), features=4), []
    for dtype in ("uint8", "float32"):
        env = Pictures(dtype=dtype)
        rnd = spec.build(env.spaces(), torch.Generator().manual_seed(5))
        learner = make(env, exact=True, extensions=Extensions([rnd]))
        targets = learner.compute_targets(learner.rollout(STEPS))
        rewards.append(targets.added["rnd/reward"])
        learner.update(targets, learning_rate=1e-3)
    torch.testing.assert_close(*rewards)


def test_a_number_that_is_not_finite_is_found_beside_images() -> None:
    learner = make(Pictures(grouped=True))
    rollout = learner.rollout(STEPS)
    row = int((rollout.last_obs.sample < 2 * STEPS).nonzero()[0])
    rollout.last_obs.obs["vector"][row, 1] = torch.nan
    targets = learner.compute_targets(rollout)
    update = learner.update(targets, learning_rate=1e-3)
    step = int(rollout.last_obs.sample[row]) // 4
    with pytest.raises(NonFiniteError, match=rf"reached_obs\['vector'\] .* step {step}") as error:
        learner.to_host(rollout, targets, update, iteration=1)
    assert error.value.minibatch["reached_obs"]["image"].shape == (4, 1, 5, 5)
