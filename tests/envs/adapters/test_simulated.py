"""Simulators of tensors keep the contract: returns, copies, reached observations, and metrics."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from esper_lightning import PPO, check_env
from esper_lightning.envs.adapters.custom import Custom, adapt
from esper_lightning.envs.adapters.simulated import SimulatedEnv, Simulator
from esper_lightning.envs.base import how_fields, spec_name
from tests.envs.adapters.simulators import (
    ManiSkill,
    ManiSkillVector,
    RslRl,
    TorchFive,
    VmasLike,
    Wrapper,
)

CPU = torch.device("cpu")
MAKES = "tests.envs.adapters.simulators"


def custom(function, **kwargs):
    return Custom(make=f"{MAKES}:{function}", shared=False, **{"num_envs": 4, **kwargs})


@pytest.mark.parametrize("spec", [
    custom("make_torch_five"),
    custom("make_torch_five", kwargs={"says_final": False}, lost="previous"),
    custom("make_rsl_rl", lost="previous"),
    custom("make_rsl_rl", lost="previous", kwargs={"privileged": "some"}),
    custom("make_rsl_rl", lost="previous", kwargs={"privileged": "none"}),
], ids=["five", "five, previous", "rsl_rl", "legged_gym", "legged_gym, none"])  # fmt: skip
def test_simulators_keep_the_contract(spec):
    check_env(spec, steps=40)


@pytest.mark.parametrize("made", [
    lambda: ManiSkill(3, limit=3),
    lambda: Wrapper(ManiSkill(3, limit=3)),
    lambda: ManiSkillVector(ManiSkill(3, limit=3), auto_reset=False),
    lambda: ManiSkillVector(ManiSkill(3, limit=3), auto_reset=True),
    lambda: Wrapper(ManiSkillVector(Wrapper(ManiSkill(3, limit=3)), auto_reset=True)),
], ids=["plain", "wrapped", "without reset", "with reset", "wrapped with reset"])  # fmt: skip
def test_rows_of_maniskill_are_reset_once_whoever_resets_them(made):
    made = made()
    env = adapt(made, CPU, 0, name="cubes", lost="error")
    env.reset()
    begun, begin = [], made.unwrapped.begin
    made.unwrapped.begin = lambda rows: (begun.append(rows.tolist()), begin(rows))
    made.unwrapped.steps[0] = 1  # whose episode ends a step before the others
    made.unwrapped.state.zero_()
    for t in range(1, 5):
        result = env.step(torch.zeros(3, 1))
        steps = made.unwrapped.steps.tolist()
        assert result.truncated.tolist() == [t == 2, t == 3, t == 3]
        assert steps == [[2, 0, 1, 2][t - 1], *[[1, 2, 0, 1][t - 1]] * 2]
    assert begun == [[True, False, False], [False, True, True]]


@pytest.mark.trap(20)
def test_agents_that_share_a_policy_are_environments():
    made = VmasLike(3, agents=2)
    env = adapt(made, CPU, 1, name="swarm", lost="error")
    obs, _ = env.reset()
    assert list(obs.shape) == [6, 2]
    for t in range(1, 7):
        result = env.step(torch.zeros(6, 1))
        assert result.terminated.tolist() == [False] * 6
        assert result.truncated.tolist() == [t == 6] * 6
    assert result.episode_length.tolist() == [6] * 6
    assert not torch.equal(result.obs, result.reached_obs)


def test_agents_that_observe_differently_are_refused():
    made = VmasLike(3)
    made.observation_space.spaces[0] = type(made.observation_space.spaces[0])(-1, 1, (5,))
    with pytest.raises(ValueError, match=r"^swarm agents must observe alike to share a policy"):
        adapt(made, CPU, 1, name="swarm", lost="error")


@pytest.mark.trap(21)
def test_a_time_out_that_overlaps_a_failure_is_a_time_out_as_in_rsl_rl():
    env = adapt(RslRl(2, limit=1), CPU, None, name="point", lost="previous")
    env.reset()
    env.simulator._env.state[0] = 5.0
    result = env.step(torch.zeros(2, 1))
    assert result.terminated.tolist() == [False, False]
    assert result.truncated.tolist() == [True, True]


@pytest.mark.parametrize("privileged", ["", "none", "some"])
def test_results_of_legged_gym_are_those_of_rsl_rl_with_one_more(privileged):
    env = adapt(RslRl(2, privileged=privileged), CPU, None, name="walk", lost="previous")
    one = adapt(RslRl(2), CPU, None, name="walk", lost="previous")
    torch.testing.assert_close(env.reset(), one.reset())
    for _ in range(7):
        torch.testing.assert_close(
            env.step(torch.ones(2, 1)), one.step(torch.ones(2, 1)), equal_nan=True
        )


def test_five_results_of_gymnasium_are_not_taken_for_those_of_legged_gym():
    made = RslRl(2)
    made.step = lambda action: (made.state, made.reward, made.steps > 9, made.steps > 5, {})
    env = adapt(made, CPU, None, name="walk", lost="previous")
    env.reset()
    with pytest.raises(ValueError, match=r"^walk.step\(\) must return obs, reward, done, extras"):
        env.step(torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("kind", "member", "value", "rule"),
    [
        (RslRl, "num_actions", "two", "be an integer of at least 1, got 'two'"),
        (RslRl, "num_actions", None, "be an integer of at least 1, got None"),
        (RslRl, "num_actions", 0, "be an integer of at least 1, got 0"),
        (RslRl, "num_envs", 2.5, "be an integer of at least 1, got 2.5"),
        (TorchFive, "num_envs", "4", "be an integer of at least 1, got '4'"),
        (TorchFive, "device", "gpu", "be a device of this machine, got 'gpu'"),
        (RslRl, "device", 1.5, "be a device of this machine, got 1.5"),
        (VmasLike, "device", None, ""),  # that of torch
    ],
)
def test_a_member_that_is_no_number_or_device_is_named(kind, member, value, rule):
    made = kind(2)
    setattr(made, member, value)
    if not rule:
        assert adapt(made, CPU, None, name="walk", lost="previous").num_envs == 4
        return
    with pytest.raises(ValueError, match=f"^walk.{member} must {rule}") as caught:
        adapt(made, CPU, None, name="walk", lost="previous")
    assert "\n" not in str(caught.value)


def test_agents_by_name_are_refused():
    made = VmasLike(2)
    made.observation_space.spaces = dict(enumerate(made.observation_space.spaces))
    with pytest.raises(ValueError, match=r"^walk must be made with dict_spaces=False"):
        adapt(made, CPU, None, name="walk", lost="previous")


def test_numbers_of_numpy_are_numbers():
    made = RslRl(2)
    made.num_actions = np.int64(3)
    assert adapt(made, CPU, None, name="walk", lost="previous").spaces.action.shape == (3,)


def test_a_simulator_that_terminates_and_never_begins_again_is_named():
    """It looks like one that resets itself until an episode has ended."""
    spec = custom("make_torch_five", kwargs={"kind": Terminating})
    with pytest.raises(ValueError, match=r"step\(\) must begin a new episode where one ended, got"):
        check_env(spec, steps=40)


class Terminating(TorchFive):
    def step(self, action):
        fell, over = self.advance(action)
        return {"policy": self.state}, self.reward, fell | over, torch.zeros_like(over), {}


def test_a_time_out_bootstraps_from_what_was_acted_on():
    env = adapt(RslRl(3, limit=2), CPU, None, name="point", lost="previous")
    env.reset()
    before = env.step(torch.zeros(3, 1)).obs.clone()
    result = env.step(torch.zeros(3, 1))
    assert result.truncated.all()
    assert torch.equal(result.reached_obs, before)
    assert not torch.equal(result.obs, before)


def test_a_time_out_without_its_end_is_an_error_that_says_what_to_set():
    env = adapt(RslRl(3, limit=1), CPU, None, name="point", lost="error")
    env.reset()
    with pytest.raises(ValueError, match=r"^point must return final_obs .* lost='previous'"):
        env.step(torch.zeros(3, 1))


@pytest.mark.trap(22)
def test_a_missing_time_out_is_a_failure():
    made = RslRl(2, limit=1)
    env = adapt(made, CPU, None, name="point", lost="error")
    env.reset()
    step = made.step
    made.step = lambda action: (*step(action)[:3], {})
    assert env.step(torch.zeros(2, 1)).terminated.all()


@pytest.mark.trap(10)
def test_what_was_returned_is_not_written_to_again():
    env = adapt(TorchFive(3), CPU, 0, name="point", lost="error")
    obs, _ = env.reset()
    kept = obs["policy"].clone()
    reward = env.step(torch.ones(3, 1)).reward
    was = reward.clone()
    env.step(torch.ones(3, 1))
    assert torch.equal(obs["policy"], kept)
    assert torch.equal(reward, was)


class TestLogs:
    def test_a_log_that_stays_counts_once(self):
        env = adapt(TorchFive(2, limit=3), CPU, 0, name="point", lost="error")
        env.reset()
        assert env.metrics() == {}
        for _ in range(5):
            env.step(torch.zeros(2, 1))
        assert env._counts == {"Episode_hold": 1}
        metrics = env.metrics()
        assert list(metrics) == ["Episode_hold"]
        assert math.isfinite(metrics["Episode_hold"])

    def test_names_stay_and_numbers_are_missing_where_nothing_was_logged(self):
        env = adapt(TorchFive(2, limit=3), CPU, 0, name="point", lost="error")
        env.reset()
        for _ in range(3):
            env.step(torch.zeros(2, 1))
        env.metrics()
        env.step(torch.zeros(2, 1))
        assert math.isnan(env.metrics()["Episode_hold"])

    def test_a_mean_is_that_of_the_logs_that_have_the_name(self):
        made = TorchFive(2)
        logs = iter([{"a": 2.0, "b": 6.0}, {"a": 2.0, "c": 1.0}, {"a": 5.0, "c": 2.0}, {"a": 1.0}])
        step = made.step
        made.step = lambda action: (*step(action)[:4], {"log": next(logs)})
        env = adapt(made, CPU, 0, name="point", lost="previous")
        env.reset()
        for _ in range(3):
            env.step(torch.zeros(2, 1))
        assert env.metrics() == {"a": 3.0, "b": 6.0, "c": 1.5}
        env.step(torch.zeros(2, 1))
        metrics = env.metrics()
        assert list(metrics) == ["a", "b", "c"]
        assert (metrics["a"], metrics["b"].isnan(), metrics["c"].isnan()) == (1.0, True, True)


class TestCustom:
    @pytest.mark.trap(19)
    def test_a_shared_simulator_is_made_once_and_reseeded(self):
        spec = Custom(make=f"{MAKES}:make_torch_five", num_envs=3, kwargs={"limit": 9})
        spec.spaces()
        one, other = spec.build(CPU, 1), spec.build(CPU, 2)
        assert one is other
        first = spec.build(CPU, 5).reset()[0]["policy"].clone()
        assert torch.equal(spec.build(CPU, 5).reset()[0]["policy"], first)
        assert not torch.equal(spec.build(CPU, 6).reset()[0]["policy"], first)

    def test_a_shared_simulator_that_takes_no_seed_is_made_anew_with_that_of_its_rank(self):
        made = []

        class Known(RslRl):
            def __init__(self, num_envs, **kwargs):
                super().__init__(num_envs, **kwargs)
                made.append(self)

        def first_obs(seed):
            spec.spaces()
            first = spec.build(CPU, seed).reset()[0].clone()
            assert spec.build(CPU, seed + 9).simulator._env is made[-1]  # its second user
            spec.release()
            spec.release()
            return first

        kwargs = {"kind": Known}
        spec = Custom(make=f"{MAKES}:make_rsl_rl", num_envs=3, kwargs=kwargs, lost="previous")
        first, again, other = first_obs(5), first_obs(5), first_obs(6)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert [each.closed for each in made] == [1] * len(made)

    @pytest.mark.parametrize(("ranks", "kind", "warnings"), [
        (2, RslRl, 1), (2, TorchFive, 0), (1, RslRl, 0),
    ])  # fmt: skip
    def test_one_that_exists_and_takes_no_seed_is_a_warning_on_several_ranks(
        self, monkeypatch, caplog, ranks, kind, warnings
    ):
        monkeypatch.setattr("esper_lightning.envs.adapters.custom._ranks", lambda: ranks)
        spec = Custom.of(kind(3), lost="previous")
        for seed in range(3):
            spec.build(CPU, seed)
        assert caplog.text.count("takes no seed at a reset") == warnings

    def test_the_name_of_the_task_is_the_functions_or_ones_own(self):
        assert custom("make_torch_five").name == "make_torch_five"
        named = custom("make_torch_five", name="walking")
        assert spec_name(named) == "walking"
        assert "name" in how_fields(named)  # a resumed run may have another

    def test_a_simulator_that_is_there_becomes_a_spec(self):
        made = TorchFive(3)
        spec = Custom.of(made)
        assert (spec.name, spec.num_envs) == ("TorchFive", 3)
        assert isinstance(spec.build(CPU, 0), SimulatedEnv)
        spec.build(CPU, 0).close()
        assert made.closed == 1

    @pytest.mark.parametrize(("make", "line"), [
        ("nowhere:make", r"^Custom.make must name a function that can be imported"),
        (f"{MAKES}:no_such", r"^Custom.make must name a function that can be imported"),
        (f"{MAKES}:CPU_COUNT", r"^Custom.make must name a function that can be imported"),
        ("make", r"^Custom.make must name a function that can be imported"),
        (f"{MAKES}:make_missing", r"^Custom.make=.*make_missing' needs no_such_package: it is not"),
        (f"{MAKES}:make_nothing", r"^make_nothing must be a vector environment .* got 'object'"),
    ])  # fmt: skip
    def test_what_makes_no_simulator_is_refused(self, make, line):
        with pytest.raises(ValueError, match=line):
            Custom(make=make, num_envs=2).spaces()

    @pytest.mark.parametrize("shared", [True, False])
    def test_worlds_of_several_agents_are_not_counted_as_environments(self, shared):
        spec = custom("make_vmas", num_envs=2, kwargs={"agents": 3})
        line = r"^Custom.num_envs must be 6, .*, got 2. Each agent is one: .* num_envs // agents"
        with pytest.raises(ValueError, match=line):
            PPO(dataclasses.replace(spec, shared=shared))


def test_a_fault_within_the_users_function_is_not_taken_for_its_arguments():
    spec = Custom(make=f"{MAKES}:make_faulty", num_envs=2)
    with pytest.raises(TypeError, match="unsupported operand"):
        spec.spaces()


def test_arguments_that_the_function_does_not_take_are_refused():
    spec = custom("make_nothing_at_all", kwargs={"wings": 2})
    with pytest.raises(ValueError, match=r"^Custom.make must name a function of num_envs"):
        spec.spaces()


def test_a_shared_and_a_separate_simulator_of_one_function_do_not_mix():
    spec = custom("make_torch_five", kwargs={"limit": 11})
    spec.spaces()
    shared = Custom(**{**vars(spec), "shared": True})
    assert isinstance(shared.build(CPU, 0), SimulatedEnv)


def test_a_simulator_that_lacks_an_attribute_is_named_with_what_it_lacks():
    class Bare(Simulator):
        def reset(self, rows, seed):
            return torch.zeros(2, 1)

        def step(self, action):
            raise NotImplementedError

    line = "got Bare without num_envs, spaces, device.$"
    with pytest.raises(ValueError, match=f"^Bare must be a Simulator, with num_envs, .*{line}"):
        adapt(Bare(), CPU, 1, name="bare", lost="error")


def five(**changed):
    """A simulator of five tensors, with other members."""
    made = TorchFive(4)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def without(made, name):
    delattr(made, name)
    return made


def steps(made, change):
    step = made.step
    made.step = lambda action: change(*step(action))
    return made


TORCH = "return obs, reward, terminated, truncated, extras"
MISTAKES = {
    "no action space": (lambda: without(five(), "single_action_space"),
        "must be a simulator that returns five tensors, .* without single_action_space."),
    "no number": (lambda: without(five(), "num_envs"), "without num_envs."),
    "a reset of one result": (lambda: five(reset=lambda seed=None: torch.zeros(4, 2)),
        r"arm.reset\(\) must return a tuple of observations and extras, got a Tensor."),
    "arrays at a reset": (lambda: five(reset=lambda seed=None: (np.zeros((4, 2)), {})),
        r"arm.reset\(\) must return observations as a tensor .* got a ndarray. torch.as_tensor"),
    "arrays in a step": (lambda: steps(five(), lambda o, r, *more: (o, r.numpy(), *more)),
        r"arm.step\(\) must return rewards and flags as tensors, got a ndarray. torch.as_tensor"),
    "a column of flags": (lambda: steps(five(), lambda o, r, te, *more: (o, r, te[:, None], *more)),
        r"arm.step\(\) must return rewards and flags of shape \[B\] = \[4\], got \[4, 1\]."),
    "too few rewards": (lambda: steps(five(), lambda o, r, *more: (o, r[1:], *more)),
        r"arm.step\(\) must return rewards and flags of shape \[B\] = \[4\], got \[3\]."),
    "extras in a list": (lambda: steps(five(), lambda *all: (*all[:4], [all[4]])),
        r"arm.step\(\) must return extras as a dict, got a list."),
    "a log in a list": (lambda: steps(five(), lambda *all: (*all[:4], {"log": [1.0]})),
        r"arm.step\(\) must return extras\['log'\] as a dict, got a list."),
    "text in a log": (lambda: steps(five(), lambda *all: (*all[:4], {"log": {"a/b": "high"}})),
        r"arm's metric 'a/b' must be numbers, got 'high'."),
    "nothing in a log": (lambda: steps(five(), lambda *all: (*all[:4], {"log": {"a": None}})),
        r"arm's metric 'a' must be numbers, got None."),
    "four results": (lambda: steps(five(), lambda o, r, te, tr, info: (o, r, te, info)),
        rf"arm.step\(\) must {TORCH}, got 4 results."),
    "another shape": (
        lambda: steps(five(), lambda o, *more: ({"policy": o["policy"][:, :1]}, *more)),
        r"arm's observations must have shape \[4, 2\], got \[4, 1\]."),
    "another group": (lambda: steps(five(), lambda o, *more: ({"critic": o["policy"]}, *more)),
        r"arm's observations must have the groups of its spaces, policy, got \['critic'\]."),
    "rsl_rl without device": (lambda: without(RslRl(4), "device"),
        "must be a simulator with rsl_rl's interface: .* without device."),
    "rsl_rl, three results": (lambda: steps(RslRl(4), lambda *all: all[:3]),
        r"arm.step\(\) must return obs, reward, done, extras, .* got 3 results."),
    "rsl_rl, arrays": (lambda: steps(RslRl(4), lambda o, r, d, x: (o, r, d.numpy(), x)),
        r"arm.step\(\) must return rewards and flags as tensors, got a ndarray."),
    "rsl_rl, a column of time-outs": (
        lambda: steps(RslRl(4), lambda o, r, d, x: (o, r, d, {"time_outs": d[:, None]})),
        r"arm.step\(\) must return rewards and flags of shape \[B\] = \[4\], got \[4, 1\]."),
    "nothing known": (lambda: without(without(five(), "device"), "num_envs"),
        r"arm must be a vector environment that has device .* got 'TorchFive'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_simulator_of_ones_own_is_one_line_that_names_the_method(mistake):
    make, line = MISTAKES[mistake]

    def play():
        env = adapt(make(), CPU, 0, name="arm", lost="previous")
        env.reset()
        env.step(torch.zeros(4, 1))

    with pytest.raises(ValueError, match=line) as caught:
        play()
    assert str(caught.value).startswith("arm")
    assert "\n" not in str(caught.value)


def test_a_reset_may_take_no_seed_and_extras_may_be_none():
    made = steps(
        five(reset=lambda: (torch.ones(4, 2), None)),
        lambda o, *more: (o["policy"], *more[:3], None),
    )
    env = adapt(made, CPU, 3, name="arm", lost="previous")
    assert not env.reseed(4)
    assert env.reset()[0].tolist() == [[1.0, 1.0]] * 4
    assert env.step(torch.zeros(4, 1)).obs.shape == (4, 2)
