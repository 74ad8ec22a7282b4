"""Gymnasium's environments keep the contract, whatever they show, take or do at the end."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from esper_lightning import check_env
from esper_lightning.core.spaces import Box, MultiDiscrete
from esper_lightning.envs.adapters.gymnasium import Gymnasium
from esper_lightning.envs.adapters.host import HostEnv
from esper_lightning.envs.adapters.serial import SerialEnv
from esper_lightning.envs.base import how_fields
from tests.envs.adapters import simulators

CPU = torch.device("cpu")
KINDS = ["box", "image", "number", "discrete", "multi", "binary", "dict"]


def counter(kind="box", **kwargs):
    return Gymnasium(id="EsperCounter-v0", num_envs=3, kwargs={"kind": kind, **kwargs})


LENGTHS = (2, 3, 4)


def counters(**kwargs):
    """Functions that make environments whose episodes have ``LENGTHS``: not all end together."""
    return [lambda n=n: simulators.Counter(length=n, **kwargs) for n in LENGTHS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.trap(14)
def test_every_kind_of_space_keeps_the_contract(kind):
    check_env(counter(kind), steps=20)


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "FrozenLake-v1"])
def test_tasks_of_gymnasium_keep_the_contract(name):
    check_env(Gymnasium(id=name, num_envs=3), steps=40)


def test_masks_in_info_come_with_every_observation():
    check_env(Gymnasium(id="EsperMasked-v0", num_envs=3, mask="allowed"), steps=20)


def test_a_step_without_a_mask_allows_every_action():
    kwargs = {"with_masks": (0, 2), "length": 4}
    for workers in (0, 2):
        spec = Gymnasium(
            id="EsperRarely-v0", num_envs=2, mask="allowed", kwargs=kwargs, workers=workers
        )
        env = spec.build(CPU, 0)
        _, mask = env.reset()
        odd = mask[:, 2].tolist()  # whether the first count is even
        assert mask[:, :2].all()
        seen = [env.step(torch.zeros(2).long()).action_mask.tolist() for _ in range(3)]
        assert seen == [[[True] * 3] * 2, [[True, True, each] for each in odd], [[True] * 3] * 2]
        env.close()


def test_a_mask_of_another_name_is_refused_with_the_names_that_are_there():
    line = r"^Gymnasium.mask must name an entry .*, got 'alowed'. There is allowed, seconds.$"
    spec = Gymnasium(id="EsperRarely-v0", num_envs=2, mask="alowed")
    with pytest.raises(ValueError, match=line):
        spec.spaces()
    line = line.replace("There is allowed, seconds", "There are no entries")
    with pytest.raises(ValueError, match=line):
        Gymnasium(id="EsperCounter-v0", num_envs=2, mask="alowed").spaces()
    made = gymnasium.make("EsperRarely-v0", with_masks=())
    serial = SerialEnv([lambda: made], entry="allowed", name="x")
    env = HostEnv(serial, CPU, 0, name="x", mask="allowed")
    with pytest.raises(ValueError, match=r"^Gymnasium.mask .* There is seconds.$"):
        env.reset()


@pytest.mark.parametrize("spec", [
    *(Gymnasium(id="EsperCounter-v0", num_envs=5, kwargs={"kind": kind, "varies": True})
      for kind in ("dict", "discrete", "multi")),
    Gymnasium(id="EsperMasked-v0", num_envs=5, mask="allowed", kwargs={"varies": True}),
], ids=["dict", "discrete", "multi", "info"])  # fmt: skip
def test_workers_return_what_one_process_returns(spec):
    more = Gymnasium(**{**vars(spec), "workers": 2})
    check_same_episodes(spec.build(CPU, 7), more.build(CPU, 7))


def check_same_episodes(alone, shared):
    try:
        first, second = alone.reset(), shared.reset()
        for t in range(12):
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            mask = torch.ones(5, 3) if first[1] is None else first[1]
            action = (mask.float() + torch.rand(5, 3)).argmax(1) if t % 2 else mask.long().argmax(1)
            if isinstance(alone.spaces.action, MultiDiscrete):
                action = torch.randint(2, (5, 2))
            if isinstance(alone.spaces.action, Box):
                action = torch.rand(5, 1)
            one, other = alone.step(action), shared.step(action)
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            first, second = (one.obs, one.action_mask), (other.obs, other.action_mask)
    finally:
        alone.close()
        shared.close()


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("kind", ["box", "dict"])
@pytest.mark.trap(9)
def test_every_autoreset_mode_resets_within_the_step_and_says_what_was_reached(
    mode, truncates, kind
):
    makers = counters(truncates=truncates, kind=kind)
    check_episodes(SyncVectorEnv(makers, autoreset_mode=mode, copy=False), truncates, kind)


ASYNC = [(mode, shared) for mode in AutoresetMode for shared in (True, False)]


@pytest.mark.parametrize(("mode", "shared"), ASYNC)
@pytest.mark.trap(8)
def test_processes_of_gymnasium_reset_rows_once_or_are_refused(mode, shared):
    env = AsyncVectorEnv(counters(), shared_memory=shared, context="fork", autoreset_mode=mode)
    try:
        if mode == AutoresetMode.NEXT_STEP and not shared:
            line = r"^Counter must be made with shared_memory=True, .* got 'AsyncVectorEnv'"
            with pytest.raises(ValueError, match=line):
                HostEnv(env, CPU, 0, name="Counter")
        else:
            check_episodes(env, truncates=True, kind="box")
    finally:
        if not env.closed:
            env.close()


class Forgetful(SyncVectorEnv):
    """As Gymnasium's environments of JAX: a reset leaves the mark that asks for a reset."""

    def reset(self, *, seed=None, options=None):
        marked = getattr(self, "_autoreset_envs", None)
        result = super().reset(seed=seed)
        if marked is not None:
            self._autoreset_envs = marked
        return result


@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_a_single_environment_is_reset_once(kind):
    makers = [lambda: simulators.Counter(length=3, kind=kind)]
    env = HostEnv(Forgetful(makers, autoreset_mode=AutoresetMode.NEXT_STEP), CPU, 0, name="Counter")
    env.reset()
    action = torch.zeros(1, *env.spaces.action.shape if kind == "box" else ())
    lengths = [env.step(action if kind == "box" else action.long()) for _ in range(12)]
    assert [int(each.episode_length) for each in lengths] == [0, 0, 3] * 4
    returns = [float(each.episode_return) for each in lengths[2::3]]
    assert returns == [3 + 6 / 8] * 4


def check_episodes(simulator, truncates, kind):
    env = HostEnv(simulator, CPU, 0, name="Counter")
    obs, _ = env.reset()
    place = (lambda seen: seen["place"]) if kind == "dict" else (lambda seen: seen)
    start = place(obs)[:, 0].clone()
    for t in range(1, 13):
        action = torch.zeros(3, 1) if kind == "box" else torch.zeros(3).long()
        result = env.step(action)
        over = torch.tensor([t % length == 0 for length in LENGTHS])
        assert result.truncated.tolist() == (over & truncates).tolist()
        assert result.terminated.tolist() == (over & (not truncates)).tolist()
        reached = [(t - 1) % length + 1 for length in LENGTHS]
        assert place(result.reached_obs)[:, 1].tolist() == reached
        torch.testing.assert_close(place(result.reached_obs)[:, 0], start)
        assert place(result.obs)[:, 1].tolist() == [t % length for length in LENGTHS]
        assert torch.equal(place(result.obs)[:, 0] != start, over)
        lengths = torch.tensor(LENGTHS)
        assert torch.equal(result.episode_length, lengths * over)
        returns = lengths * (1 + (lengths + 1) / 16)
        torch.testing.assert_close(result.episode_return[over], returns[over])
        assert torch.equal(result.episode_return.isnan(), ~over)
        start = place(result.obs)[:, 0].clone()
    env.close()


@pytest.mark.trap(7)
def test_an_environment_that_resets_all_rows_at_once_is_refused_by_name():
    env = gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point")
    with pytest.raises(ValueError, match=r"^CartPole must reset single environments .* got 'Cart"):
        HostEnv(env, CPU, 0, name="CartPole")


class TestNative:
    """Vector environments of the package: the same episodes as single environments have."""

    @pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
    @pytest.mark.parametrize("kind", ["box", "dict", "discrete", "image", "masked"])
    @pytest.mark.parametrize("truncates", [True, False])
    def test_all_rows_return_what_single_environments_return(self, mode, kind, truncates):
        kwargs = {"kind": kind, "truncates": truncates, "varies": True}
        mask = "allowed" if kind == "masked" else None
        single = Gymnasium(id="EsperNumbered-v0", num_envs=5, kwargs=kwargs, mask=mask)
        native = Gymnasium(
            id="EsperNumbered-v0",
            num_envs=5,
            kwargs={**kwargs, "autoreset_mode": mode},
            mask=mask,
            native=True,
        )
        assert native.spaces() == single.spaces()
        check_same_episodes(single.build(CPU, 7), native.build(CPU, 7))

    @pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
    def test_the_contract_is_kept(self, mode):
        kwargs = {"varies": True, "autoreset_mode": mode}
        spec = Gymnasium(id="EsperNumbered-v0", num_envs=3, kwargs=kwargs, native=True)
        check_env(spec, steps=20)

    def test_a_spec_that_differs_only_in_native_is_another_environment(self):
        spec = Gymnasium(id="CartPole-v1", num_envs=4)
        assert spec != Gymnasium(id="CartPole-v1", num_envs=4, native=True)
        assert "native" not in how_fields(spec)

    @pytest.mark.parametrize("num_envs", [1, 2, 5])
    def test_those_that_reset_all_rows_at_once_are_refused_with_the_way_out(self, num_envs):
        line = r"^CartPole-v1 must reset single environments .*VectorEnv'. Set Gymnasium.native=Fa"
        spec = Gymnasium(id="CartPole-v1", num_envs=num_envs, native=True)
        with pytest.raises(ValueError, match=line):
            spec.spaces()
        with pytest.raises(ValueError, match=line):
            spec.build(CPU, 0)

    def test_rows_that_stay_where_they_begin_do_not_hide_a_reset_of_all(self):
        for mode in ("NextStep", "Disabled"):
            kwargs = {"autoreset_mode": mode, "kind": "binary"}  # whose first step shows nothing
            spec = Gymnasium(id="EsperDeaf-v0", num_envs=3, kwargs=kwargs, native=True)
            with pytest.raises(ValueError, match=r"^EsperDeaf-v0 must reset single environments"):
                spec.spaces()

    def test_what_is_refused_is_closed(self, monkeypatch):
        closed = []
        monkeypatch.setattr(simulators.Deaf, "close", lambda self, **_: closed.append(self))
        kwargs = {"autoreset_mode": "Disabled"}
        with pytest.raises(ValueError, match="must reset single environments"):
            Gymnasium(id="EsperDeaf-v0", num_envs=3, kwargs=kwargs, native=True).spaces()
        assert len(closed) == 1

    @pytest.mark.parametrize(("given", "line"), [
        ({"id": "Pendulum-v1"}, r"^Gymnasium.id='Pendulum-v1' cannot be made: .* Set .*native=F"),
        ({"workers": 2}, r"^Gymnasium.workers must be 0 with Gymnasium.native=True, got 2.$"),
        ({"wrappers": ("a.b",)}, r"^Gymnasium.wrappers must be empty with Gymnasium.native=True"),
        ({"id": "NoSuch-v0"}, r"^Gymnasium.id must name a registered environment"),
        ({"id": "CartPole-v1", "kwargs": {"wings": 2}}, r"made: .* 'wings'\. Set .*native=False"),
        ({"kwargs": {"autoreset_mode": "Disabled", "kind": "masked"}, "mask": "no"},
         r"^Gymnasium.mask must name an entry"),
    ])  # fmt: skip
    def test_what_does_not_fit_is_one_line(self, given, line):
        with pytest.raises(ValueError, match=line) as caught:
            Gymnasium(**{"id": "EsperNumbered-v0", "native": True, **given}).spaces()
        assert "\n" not in str(caught.value)


def test_a_truncated_episode_without_its_end_is_refused_or_takes_what_was_acted_on():
    class Forgetful(SyncVectorEnv):
        def step(self, actions):
            *rest, info = super().step(actions)
            return *rest, {k: v for k, v in info.items() if not k.startswith("final")}

    makers = [lambda: simulators.Counter(length=2)] * 2
    made = [Forgetful(makers, autoreset_mode=AutoresetMode.SAME_STEP) for _ in range(2)]
    env = HostEnv(made[0], CPU, 0, name="Counter")
    env.reset()
    env.step(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"^Counter must return final_obs .* lost='previous'"):
        env.step(torch.zeros(2, 1))
    env = HostEnv(made[1], CPU, 0, name="Counter", lost="previous")
    env.reset()
    before = env.step(torch.zeros(2, 1)).obs
    assert torch.equal(env.step(torch.zeros(2, 1)).reached_obs, before)


def test_seeds_decide_everything_and_differ_between_environments():
    same = [counter().build(CPU, seed).reset()[0] for seed in (3, 3, 4)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    assert len(set(same[0][:, 0].tolist())) == 3


@pytest.mark.trap(5)
def test_images_stay_bytes():
    obs, _ = counter("image").build(CPU, 0).reset()
    assert obs.dtype == torch.uint8
    assert counter("image").spaces().obs.dtype == "uint8"


@pytest.mark.parametrize(("given", "line"), [
    ({"id": "NoSuch-v0"}, r"^Gymnasium.id must .*, as package:name where .*, got 'NoSuch-v0'\."),
    ({"id": "Taxi-v3"}, r"^Gymnasium.id='Taxi-v3' cannot be made: .* deprecated"),
    ({"id": "CartPole-v1", "kwargs": {"wings": 2}}, r"^Gymnasium.id='CartPole-v1' cannot be made"),
    ({"id": "CartPole-v1", "wrappers": ("no.such",)}, r"^Gymnasium.wrappers must name importable"),
    ({"id": "CartPole-v1", "wrappers": ("gymnasium.wrappers.TimeLimit",)},
     r"^Gymnasium.wrappers must take an environment and nothing else, got .*max_episode_steps"),
    ({"id": "CartPole-v1", "wrappers": ("gymnasium.wrappers.GrayscaleObservation",)},
     r"^Gymnasium.wrappers must fit, got '.*GrayscaleObservation': ValueError: .* image"),
    ({"id": "CartPole-v1", "wrappers": ("math.sqrt",)}, r"^Gymnasium.wrappers must fit, .*'math"),
    ({"id": "no_such_package:Thing-v0"}, r"needs no_such_package. Install it, or add"),
    ({"id": "Hopper-v3"}, r"^Gymnasium.id='Hopper-v3' cannot be made: .* moved to"),
    ({"id": "EsperCounter-v0", "kwargs": {"kind": "empty"}}, r"^Box.shape must have at least one"),
    ({"id": ""}, r"^Gymnasium.id must name a registered environment"),
    ({"id": "CartPole-v1", "workers": -1}, r"^Gymnasium.workers must be at least 0"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
@pytest.mark.trap(16)
def test_what_cannot_be_made_is_one_line(given, line):
    with pytest.raises(ValueError, match=line) as caught:
        Gymnasium(**given).spaces()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("package", "extra"), [
    ("ale_py", "atari"), ("minigrid", "minigrid"), ("mujoco", "gymnasium"),
])  # fmt: skip
def test_a_missing_package_is_named_with_the_way_to_install_it(package, extra, monkeypatch):
    for loaded in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, loaded)  # as in a process that has made no such task
    monkeypatch.setitem(sys.modules, package, None)
    name = "Hopper-v5" if package == "mujoco" else f"{package}:Thing-v0"
    line = f"^Gymnasium.id='{name}' needs {package if package != 'mujoco' else '.*'}: "
    with pytest.raises(ValueError, match=line) as caught:
        Gymnasium(id=name)._one()
    command = f"pip install 'esper_lightning[{extra}]'."
    assert command in str(caught.value)[:120]  # one line of a terminal has the way out


def test_a_missing_package_of_a_wrapper_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "minigrid", None)
    monkeypatch.delitem(sys.modules, "minigrid.wrappers", raising=False)
    wrappers = ("minigrid.wrappers.ImgObsWrapper",)
    with pytest.raises(ValueError, match=r"needs minigrid: pip install 'esper_lightning\[minigr"):
        Gymnasium(id="CartPole-v1", wrappers=wrappers).spaces()


def test_a_missing_package_that_no_extra_has_is_only_named():
    gymnasium.register("EsperElsewhere-v0", "no_such_package.envs:Thing")
    with pytest.raises(ValueError, match=r"needs no_such_package. Install it") as caught:
        Gymnasium(id="EsperElsewhere-v0").spaces()
    assert "pip install" not in str(caught.value)


@pytest.mark.parametrize(("method", "result", "line"), [
    ("reset", (np.zeros(1), {}), r"observation must be float64 \[2\] as .*, got float64 \[1\]"),
    ("reset", np.zeros(3), r"must return an observation and info, got another result"),
    ("reset", (np.zeros((2, 1)), {}), r"could not broadcast"),
    ("step", (np.zeros(2), 1.0, True, {}), r"must return an observation, a number as reward, .* 4"),
    ("step", (np.zeros(2), [1.0, 2.0], False, False, {}), r"a number as reward, .* sequence"),
    ("step", (np.zeros(1), 1.0, False, False, {}), r"must be float64 \[2\] .*, got float64 \[1\]"),
    ("step", (0.0, 1.0, False, False, {}), r"must be float64 \[2\] as .*, got float64 \[\]"),
    ("step", (np.zeros(2), 1.0, False, {}, False), r"truncated and info, .* type bool"),
])  # fmt: skip
def test_what_an_environment_returns_beside_its_spaces_is_refused(
    method, result, line, monkeypatch
):
    env = counter().build(CPU, 0)
    env.reset()
    monkeypatch.setattr(simulators.Counter, method, lambda *_, **__: result)
    with pytest.raises(ValueError, match=rf"^EsperCounter-v0.{method}\(\).*{line}"):
        env.reset() if method == "reset" else env.step(torch.zeros(3, 1))


def test_an_image_of_numbers_between_0_and_1_is_not_rounded_to_bytes(monkeypatch):
    env = counter("image").build(CPU, 0)
    monkeypatch.setattr(simulators.Counter, "_obs", lambda _: np.full((3, 8, 8), 0.5))
    with pytest.raises(ValueError, match=r"must be uint8 \[3, 8, 8\] as .*, got float64"):
        env.reset()


def test_environments_beside_one_that_cannot_be_made_are_closed(monkeypatch):
    made, closed = [], []
    monkeypatch.setattr(simulators.Counter, "close", lambda self: closed.extend([self]))

    class Fourth(simulators.Counter):
        def __init__(self):
            made.append(self)
            if len(made) == 4:
                raise MemoryError
            super().__init__()

    gymnasium.register("EsperFourth-v0", Fourth)
    spec = Gymnasium(id="EsperFourth-v0", num_envs=4)
    spec.spaces()
    with pytest.raises(MemoryError):
        spec.build(CPU, 0)
    assert closed == made[:3]


def test_workers_end_where_their_environments_cannot_be_used(monkeypatch):
    spec = Gymnasium(id="EsperCounter-v0", num_envs=4, workers=2)
    children = multiprocessing.active_children()

    def fail(*args, **kwargs):
        raise MemoryError

    for owner, name in ((HostEnv, "__init__"), (SerialEnv, "__init__")):
        monkeypatch.setattr(owner, name, fail)
        with pytest.raises((MemoryError, RuntimeError)):
            spec.build(CPU, 0)
        assert multiprocessing.active_children() == children


def test_a_space_without_a_counterpart_is_refused_by_name():
    space = gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(2)])

    class Strange(simulators.Counter):
        observation_space = property(lambda self: space, lambda self, value: None)

    gymnasium.register("EsperStrange-v0", Strange)
    line = r"^observation_space must be Box, Discrete, .* Wrap it"
    with pytest.raises(ValueError, match=line):
        Gymnasium(id="EsperStrange-v0").spaces()


class TestWorkers:
    def test_a_worker_that_dies_names_its_environment(self):
        env = Gymnasium(id="EsperDying-v0", num_envs=4, workers=2).build(CPU, 0)
        env.reset()
        env.step(torch.zeros(4, 1))
        env.step(torch.zeros(4, 1))
        line = r"^EsperDying-v0: worker 0 \(environments 0 to 1\) died \(SIGKILL\)\.$"
        with pytest.raises(RuntimeError, match=line):
            env.step(torch.zeros(4, 1))
        env.close()

    def test_a_worker_that_fails_shows_its_traceback(self):
        env = Gymnasium(id="EsperFailing-v0", num_envs=2, workers=2).build(CPU, 0)
        env.reset()
        env.step(torch.zeros(2, 1))
        env.step(torch.zeros(2, 1))
        with pytest.raises(RuntimeError, match=r"(?s)worker 0 .* failed:\n.*the gripper is stuck"):
            env.step(torch.zeros(2, 1))
        env.close()

    def test_none_is_left_after_close(self):
        env = Gymnasium(id="EsperCounter-v0", num_envs=4, workers=2).build(CPU, 0)
        processes = list(env._env._processes)
        assert all(process.is_alive() for process in processes)
        env.close()
        assert not any(process.is_alive() for process in processes)

    def test_none_outlives_a_process_that_is_killed(self):
        program = (
            "import time, torch\n"
            "from esper_lightning.envs.adapters.gymnasium import Gymnasium\n"
            "env = Gymnasium(id='CartPole-v1', num_envs=2, workers=2)"
            ".build(torch.device('cpu'), 0)\n"
            "print(*[p.pid for p in env._env._processes], flush=True)\n"
            "time.sleep(60)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        )
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        end = time.monotonic() + 10
        while any(_lives(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(_lives(pid) for pid in pids)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_returns_are_summed_in_double_precision():
    class Wide(simulators.Counter):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, 2.0**24 if self.steps == 1 else 1.0, *rest

    makers = [lambda: Wide(length=5)] * 3
    vector_env = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
    env = HostEnv(vector_env, CPU, 0, name="Wide", resets_rows=True)
    env.reset()
    results = [env.step(torch.zeros(3, 1)) for _ in range(5)]
    assert results[-1].episode_return.tolist() == [2.0**24 + 4] * 3  # in float32: 2 ** 24
