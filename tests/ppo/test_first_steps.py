"""The first steps of a run must obey the contract of ``check_env``, with the same errors."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from esper_lightning import PPO, PPOConfig, check_env
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.envs import CartPole
from esper_lightning.envs.autoreset import AutoresetEnv
from esper_lightning.envs.base import EnvSpec
from esper_lightning.envs.inspector import FIRST_STEPS, FirstSteps
from tests.envs import test_check as cases

SMALL = PPOConfig(rollout_steps=4, minibatches=2, epochs=1)
# Training says itself what is not finite, and only a whole drive shows the last one.
NOT_HERE = ("reward nan", "obs inf", "reached is reset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(EnvSpec):
    """Builds one of the environments that ``check_env`` is tried on."""

    num_envs: int = 8
    env: Any = cases.Walk

    def spaces(self) -> EnvSpaces:
        return cases.Walk.spaces.fget(self.env)

    def build(self, device, seed):
        return self.env(self.num_envs)


def ppo(spec, **settings) -> PPO:
    defaults = {"ppo": SMALL, "total_env_steps": 8 * 12, "eval_episodes": 8}
    return PPO(spec, **{**defaults, **settings})


def refused(run, *args) -> list[str]:
    with pytest.raises(ValueError, match="must") as error:
        run(*args)
    return str(error.value).splitlines()


@pytest.mark.parametrize("name", [name for name in cases.STEP_PROBLEMS if name not in NOT_HERE])
def test_training_gives_the_errors_of_check_env(make_trainer, name):
    env, message = cases.STEP_PROBLEMS[name]
    lines = refused(make_trainer().fit, ppo(Spec(env=env)))
    assert any(line.startswith(f"Spec.{message}"[:60]) for line in lines), lines


def test_an_evaluation_gives_the_errors_of_check_env(make_trainer):
    env, message = cases.STEP_PROBLEMS["reward shape"]
    lines = refused(make_trainer(limit_val_batches=1.0).validate, ppo(Spec(env=env)))
    assert lines == [f"Spec.{message}"]


def returning(what):
    """An environment whose ``step`` makes something else of its result."""

    class Other(cases.Walk):
        def step(self, action):
            return what(super().step(action))

    return Other


def starting(what):
    """An environment whose ``reset`` returns something else."""

    class Other(cases.Walk):
        def reset(self):
            return what(super().reset())

    return Other


class Overwrites(cases.Walk):
    """Returns a tensor into which it writes again later."""

    obs_space = Box((2,))

    def observe(self, position):
        if not hasattr(self, "held"):
            self.held = torch.zeros_like(position)
        return self.held.copy_(position)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            returning(lambda r: (r.obs, r.reward, r.terminated, r.truncated, {})),
            "step() must return a StepResult, got tuple. Gymnasium(...) and Custom(...) adapt",
        ),
        (
            returning(lambda r: (r.obs, r.reward, r.terminated, {})),
            "step() must return a StepResult",
        ),
        (returning(lambda r: r._asdict()), "step() must return a StepResult, got dict."),
        (returning(lambda r: None), "step() must return a StepResult, got None"),
        (
            returning(lambda r: r._replace(reward=r.reward.sum())),
            "step().reward must have shape [8]",
        ),
        (returning(lambda r: r._replace(reward=r.reward[:1])), "step().reward must have shape"),
        (
            returning(lambda r: r._replace(reward=r.reward.numpy())),
            "step().reward must be a floating tensor of shape [8], got ",
        ),
        (
            returning(lambda r: r._replace(episode_return=r.episode_return[:, None])),
            "step().episode_return must have shape [8], got [8, 1].",
        ),
        (
            returning(lambda r: r._replace(episode_length=r.episode_length[:, None])),
            "step().episode_length must have shape [8], got [8, 1].",
        ),
        (
            returning(lambda r: r._replace(truncated=r.truncated.int())),
            "step().truncated must have a bool dtype, got torch.int32.",
        ),
        (
            returning(lambda r: r._replace(action_mask=r.action_mask.float())),
            "step().action_mask must have a bool dtype, got torch.float32.",
        ),
        (
            returning(lambda r: r._replace(action_mask=r.action_mask[:, :4])),
            "step().action_mask must have shape [8, 5], got [8, 4].",
        ),
        (
            returning(lambda r: r._replace(reached_obs=None)),
            "step().reached_obs['actor'] must be a floating tensor of shape [8, 2], got None.",
        ),
        (
            returning(lambda r: r._replace(obs={k: v.double() for k, v in r.obs.items()})),
            "step().obs['actor'] must keep the dtype torch.float32 of the first observation, got",
        ),
        (starting(lambda pair: pair[0]), "reset() must return (obs, action_mask), got dict."),
        (starting(lambda pair: None), "reset() must return (obs, action_mask), got NoneType."),
        (
            starting(lambda pair: (pair[0], {})),
            "reset() must return (obs, action_mask), got (obs, info). The mask is None ",
        ),
        (
            starting(lambda pair: (pair[0], {"seed": 1, "lives": [3]})),
            "reset() must return (obs, action_mask), got (obs, info). The mask is None ",
        ),
        (
            starting(lambda pair: (pair[0], pair[1] & False)),
            "reset().action_mask must allow a",
        ),
        (
            starting(lambda pair: ({k: np.asarray(v) for k, v in pair[0].items()}, pair[1])),
            "reset().obs['actor'] must be a floating tensor of shape [8, 2], got a ndarray. "
            "torch.as_tensor(array, device=device) makes one.",
        ),
        (Overwrites, "reset().obs must keep its values when stepped on, got others."),
        (cases.WritesAction, "step().action must be left as it was, got another."),
        (cases.OneMore, "num_envs must equal 9, as built, got 8."),
        (
            lambda num_envs: None,
            "build() must return an environment, got None",
        ),
    ],
)
def test_a_wrong_step_result_is_an_error_of_one_line(make_trainer, env, message):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(Spec):
        def spaces(self):
            return cases.Walk.spaces.fget(Overwrites if env is Overwrites else cases.Walk)

    lines = refused(make_trainer().fit, ppo(Mine(env=env)))
    assert any(line.startswith(f"Mine.{message}") for line in lines), lines
    assert all(len(line) < 250 for line in lines)


class Told:
    """A spec with any ``num_envs`` and any spaces."""

    def __init__(self, num_envs=8, spaces=None):
        self.num_envs, self._spaces = num_envs, spaces

    def spaces(self):
        return self._spaces

    def build(self, device, seed):
        raise AssertionError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Told(), "Told.spaces must be an EnvSpaces, got None."),
        (Told(spaces=(Box((2,)), Discrete(2))), "Told.spaces must be an EnvSpaces, got (Box("),
        (Told(num_envs=8.0), "Told.num_envs must be an integer of at least 1, got 8.0."),
        (Told(num_envs=True), "Told.num_envs must be an integer of at least 1, got True."),
        (Told(num_envs=None), "Told.num_envs must be an integer of at least 1, got None."),
        (Told(num_envs=0), "Told.num_envs must be an integer of at least 1, got 0."),
    ],
)
def test_a_spec_with_nonsense_is_refused(spec, message):
    (line,) = refused(PPO, spec)
    assert line.startswith(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impure(CartPole):
    """A rollout of it is compiled, but its transition is not what it says."""

    how: str = "writes"

    def build(self, device, seed):
        return ImpureEnv(self, device=device, seed=seed)


class ImpureEnv(AutoresetEnv):
    def transition(self, episodes, action, initial):
        after, result = super().transition(episodes, action, initial)
        if self._task.how == "writes":
            episodes.elapsed.add_(1)
        if self._task.how == "column":
            result = result._replace(reward=result.reward[:, None])
        if self._task.how == "result":
            return result
        return after, result


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("writes", "Impure.transition() must change nothing, got other episodes() after it."),
        ("column", "Impure.step().reward must have shape [8], got [8, 1]."),
        ("result", "Impure.transition() must return (episodes, StepResult), got StepResult."),
    ],
)
def test_a_transition_is_inspected_before_it_is_compiled(make_trainer, how, message, mode):
    lines = refused(make_trainer().fit, ppo(Impure(num_envs=8, how=how), compile=mode))
    assert message in lines


def test_an_inspection_changes_no_bit_of_training(make_trainer, monkeypatch):
    def weights():
        model = ppo(CartPole(num_envs=8), total_env_steps=8 * 4 * 5)
        make_trainer().fit(model)
        return model.policy.state_dict()

    inspected = weights()
    monkeypatch.setattr(FirstSteps.__init__, "__kwdefaults__", {"steps": 0})
    for name, value in weights().items():
        assert torch.equal(value, inspected[name]), name


def test_only_the_first_steps_of_a_run_are_inspected(make_trainer):
    class Odd(cases.Walk):
        steps = 0

        def step(self, action):
            result = super().step(action)
            type(self).steps += 1
            return result._replace(
                episode_length=result.episode_length + (self.steps > FIRST_STEPS)
            )

    make_trainer().fit(ppo(Spec(env=Odd)))
    assert Odd.steps == 12


LATER = {
    "reward shape []": lambda r: r._replace(reward=r.reward.sum()),
    "reward shape [1]": lambda r: r._replace(reward=r.reward[:1]),
    "reward shape [8, 1]": lambda r: r._replace(reward=r.reward[:, None]),
    "reward int64": lambda r: r._replace(reward=r.reward.long()),
    "reward array": lambda r: r._replace(reward=r.reward.numpy()),
    "reward a nested tensor": lambda r: r._replace(reward=cases.nested(r.reward)),
    "reward that cannot be shown": lambda r: r._replace(reward=cases.Unspeakable()),
    "terminated shape []": lambda r: r._replace(terminated=r.terminated[0]),
    "truncated float32": lambda r: r._replace(truncated=r.truncated.float()),
    "obs shape [1, 2]": lambda r: r._replace(obs={k: v[:1] for k, v in r.obs.items()}),
    "obs float64": lambda r: r._replace(obs={k: v.double() for k, v in r.obs.items()}),
    "action_mask shape [1, 5]": lambda r: r._replace(action_mask=r.action_mask[:1]),
}


def returning_later(what):
    """An environment whose ``step`` makes something else of its result in the third iteration."""

    class Later(cases.Walk):
        steps = 0

        def step(self, action):
            self.steps += 1
            result = super().step(action)
            return what(result) if self.steps > FIRST_STEPS + 2 else result

    return Later


@pytest.mark.parametrize("name", LATER)
def test_a_result_of_another_form_is_an_error_at_any_step(make_trainer, name):
    model = ppo(Spec(env=returning_later(LATER[name])), total_env_steps=8 * 4 * 10)
    lines = refused(make_trainer().fit, model)
    field, got = name.split(maxsplit=1)
    assert lines[0].startswith(f"Spec.step().{field}"), lines
    assert lines[0].endswith(f"{got.removeprefix('shape ')}.") or got == "array", lines
    assert model.iteration == 2


def test_a_later_result_that_is_none_is_named(make_trainer):
    model = ppo(Spec(env=returning_later(lambda r: None)), total_env_steps=8 * 4 * 10)
    assert refused(make_trainer().fit, model)[0].startswith("Spec.step() must return a StepResult")


def test_another_order_of_groups_and_another_precision_of_rewards_are_no_errors(make_trainer):
    def turned(result):
        obs = dict(reversed(result.obs.items()))
        return result._replace(obs=obs, reward=result.reward.double())

    model = ppo(Spec(env=returning_later(turned)), total_env_steps=8 * 4 * 4)
    make_trainer().fit(model)
    assert model.iteration == 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_observations_may_be_whole_numbers(make_trainer, dtype):
    class Whole(cases.Walk):
        obs_space = Box((2,), low=0.0, high=255.0)

        def observe(self, position):
            return position.to(dtype)

    check_env(Whole(), steps=30)
    make_trainer(limit_val_batches=1.0).fit(ppo(Spec(env=Whole), iterations_per_epoch=1))


# Later on.


def stuck_from(step, raises=False):
    class Stuck(cases.Walk):
        steps = 0

        def step(self, action):
            if raises and self.steps == step:
                raise IndexError("index 67 is out of bounds for dimension 0 with size 5")
            type(self).steps += 1
            result = super().step(action)
            if self.steps < step:
                return result
            mask = result.action_mask.clone()
            mask[3, 2:] = False
            return result._replace(action_mask=mask)

    return Stuck


@pytest.mark.parametrize("mode", ["off", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("native_code")
def test_a_mask_that_later_allows_nothing_is_named_and_spares_the_weights(make_trainer, mode):
    config = PPOConfig(rollout_steps=4, normalize_obs=True)
    how = {"ppo": config, "compile": mode}
    good = ppo(Spec(env=stuck_from(14)), total_env_steps=8 * 4 * 3, **how)
    make_trainer().fit(good)
    model = ppo(Spec(env=stuck_from(14)), total_env_steps=8 * 4 * 10, **how)
    message = (
        "Spec.step().action_mask must allow a choice for every component, got none in "
        "environment 3, component 1 at rollout step 2. The weights are those of the previous "
        "iteration. (Iteration 4.)"
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make_trainer().fit(model)
    assert model.iteration == 3
    for name, value in good.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_what_an_environment_makes_of_an_empty_mask_is_not_blamed_on_it(make_trainer):
    model = ppo(Spec(env=stuck_from(14, raises=True)), total_env_steps=8 * 4 * 10)
    message = "Spec.step().action_mask must allow a choice for every component, got none in envir"
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        make_trainer().fit(model)
    assert isinstance(error.value.__cause__, IndexError)


def test_evidence_of_a_value_that_is_not_finite_is_the_same_at_the_first_steps(make_trainer):
    env, _ = cases.STEP_PROBLEMS["reward nan"]
    with pytest.raises(NonFiniteError, match=r"^Spec.step must return finite values, got nan in"):
        make_trainer().fit(ppo(Spec(env=env)))
