"""Steps that are replayed like CUDA graphs, and steps under the autocast of a policy."""

import gc
import weakref

import pytest
import torch

from esper_lightning.compiling import loops, tracing
from esper_lightning.core.tensor_trees import leaves, map_tree
from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis import env as module
from esper_lightning.envs.morphogenesis.baselines import random_legal
from esper_lightning.envs.morphogenesis.training import static_update

CPU = torch.device("cpu")
SPEC = Morphogenesis.synthetic(
    num_envs=3, channels=(8, 8), kernels=(3, 1), pools=(4, 1), train_batches=2, batch_size=16,
    validation_size=32, epochs=4,
)  # fmt: skip


class Replayed:
    """A stand-in for a graph: it reads fixed addresses and always returns the same tensors."""

    def __init__(self, function):
        self.function, self.args, self.result = function, None, None

    def __call__(self, *args):
        if self.args is None:
            self.args = args
            memory = [leaf.untyped_storage().data_ptr() for leaf in leaves(args)]
            assert len(set(memory)) == len(memory)
        for static, value in zip(leaves(self.args), leaves(args), strict=True):
            if static.data_ptr() != value.data_ptr():
                static.copy_(value)
        result = self.function(*self.args)
        if self.result is None:
            self.result = result
        for static, value in zip(leaves(self.result), leaves(result), strict=True):
            static.copy_(value)
        return self.result


def play(env, steps, *, tests_ends=()):
    """All results of a trajectory, with their values at once and their values later."""
    obs, mask = env.reset()
    at_once, later = [], [(obs, mask)]
    for step in range(steps):
        env.tests_ends = step in tests_ends
        if step == 5:
            env.load_state_dict(env.state_dict())
        action = random_legal(env)
        result = env.step(action)
        later.append((action, result, env.report, env.metrics()))
        at_once.append(map_tree(torch.clone, later[-1]))
    return at_once, later[1:], env.state_dict()


def equal(first, other):
    pairs = zip(leaves(first), leaves(other), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def test_a_replayed_step_equals_a_plain_step(monkeypatch):
    def build():
        return SPEC.build(CPU, 4, static=True)

    expected, _, end = play(build(), 10, tests_ends=(3, 7))
    monkeypatch.setattr(module, "capture_function", lambda _, f, *, device: Replayed(f))
    at_once, later, its_end = play(build(), 10, tests_ends=(3, 7))
    assert equal(at_once, expected)
    assert equal(later, expected)  # no result is written into again
    assert equal(its_end, end)


def test_a_compiled_update_of_hosts_equals_a_plain_one(monkeypatch):
    """On CUDA; here the compiler returns the traced operations as they are."""
    expected = play(SPEC.build(CPU, 4, static=True), 4)
    traced = []
    monkeypatch.setattr(loops, "_is_native", lambda mode, device: False)
    monkeypatch.setattr(loops, "_is_compiled", lambda mode, device: mode == "default")
    monkeypatch.setattr(tracing, "compile_graph", lambda graph: traced.append(graph) or graph)
    env = SPEC.build(CPU, 4, static=True)
    trainer = env.trainer
    update = static_update(trainer.architecture, SPEC.sgd())
    trainer._update = loops.compile_function("update", update, mode="default", device=CPU)
    assert equal(play(env, 4), expected)
    assert len(traced) == 1


def test_environments_with_a_graph_need_no_garbage_collector(monkeypatch):
    """Each evaluation would keep its hosts, and the memory of its graph, for many iterations."""
    monkeypatch.setattr(module, "capture_function", lambda _, f, *, device: Replayed(f))
    env = SPEC.build(CPU, 4, static=True)
    env.reset()
    env.step(random_legal(env))
    gone = weakref.ref(env)
    gc.disable()
    try:
        del env
        assert gone() is None
    finally:
        gc.enable()


def test_reseeded_environments_are_new_ones_and_keep_their_graph(monkeypatch):
    captures = []

    def capture(_, function, *, device):
        captures.append(function)
        return Replayed(function)

    monkeypatch.setattr(module, "capture_function", capture)
    env = SPEC.build(CPU, 4, static=True)
    expected = play(env, 4)
    for seed, graphs in ((4, 1), (4, 1), (5, 2)):
        assert env.reseed(seed)
        if seed == 5:
            expected = play(SPEC.build(CPU, 5, static=True), 4)
        got = play(env, 4)
        assert equal(got[:2], expected[:2])
        assert equal(got[2], expected[2])
        assert len(captures) == graphs + (seed == 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_equals_a_plain_step(monkeypatch, caplog):
    device = torch.device("cuda")
    captured = play(SPEC.build(device, 4), 10, tests_ends=(3, 7))
    assert "slower way" not in caplog.text
    monkeypatch.setattr(module, "capture_function", lambda _, f, *, device: f)
    plain = play(SPEC.build(device, 4), 10, tests_ends=(3, 7))
    for a, b in zip(leaves(captured), leaves(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("static", [False, True])
def test_hosts_are_trained_in_their_own_precision(static):
    """A policy in bfloat16 acts in the same environments."""

    def course():
        return play(SPEC.build(CPU, 5, static=static), 6, tests_ends=(3,))

    expected = course()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(course(), expected)


def test_metrics_are_means_over_the_steps_since_the_last_call():
    env = SPEC.build(CPU, 6)
    env.reset()
    assert all(metric.isnan() for metric in env.metrics().values())
    reports = []
    for _ in range(5):
        env.step(random_legal(env))
        reports.append(env.report)
    metrics = env.metrics()
    expected = {
        f"reward_{name}": torch.stack([report.terms[name] for report in reports]).mean()
        for name in reports[0].terms
    }
    for name in ("grown_parameters", "diverged"):
        expected[name] = torch.stack([getattr(r, name) for r in reports]).float().mean()
    assert metrics.keys() == expected.keys()
    assert expected["grown_parameters"] > 0
    for name, metric in metrics.items():
        torch.testing.assert_close(metric, expected[name], msg=name)
    assert all(metric.isnan() for metric in env.metrics().values())
