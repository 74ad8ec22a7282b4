"""Exported policies act like the original, in programs that know nothing of this package."""

import dataclasses
import logging
import os
import re
import subprocess
import sys

import onnxruntime
import pytest
import torch

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.core.spaces import Discrete
from esper_lightning.envs import Acrobot, CartPole, MountainCar, Pendulum
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.training import export
from esper_lightning.training.export import Inputs, export_policy
from tests.growth.test_play import SPEC as GROWTH
from tests.training.test_module import NotADataclass

CASES = {
    "CartPole": (CartPole(num_envs=4), MLP()),
    "Acrobot": (Acrobot(num_envs=4), MLP(trunk="shared", activation="elu")),
    "MountainCar": (MountainCar(num_envs=4), MLP()),
    "clipped": (Pendulum(num_envs=4), MLP()),
    "squashed": (Pendulum(num_envs=4), MLP(action_bounds="tanh")),
    "groups and masks": (NotADataclass(), MLP(actor_obs=("position",))),
    "growth": (GROWTH, MLP(hidden_sizes=(8,))),
}
GRU, LSTM = Recurrent(memory_size=8), Recurrent(memory_size=8, cell="lstm")
WITH_MEMORY = {
    "CartPole, GRU": (CartPole(num_envs=4), GRU),
    "groups and masks, LSTM": (NotADataclass(), LSTM),
    "growth, GRU": (GROWTH, GRU),
    "growth, LSTM": (GROWTH, LSTM),
}


@pytest.fixture
def trained(make_trainer):
    """A model whose statistics and weights are not those it began with."""

    def train(case="CartPole", **ppo):
        env, policy = (CASES | WITH_MEMORY)[case]
        settings = PPOConfig(rollout_steps=16, minibatches=1, learning_rate=0.05, **ppo)
        model = PPO(env, policy, settings, total_env_steps=128)
        make_trainer().fit(model)
        return model

    return train


def seen_by(model, samples):
    """Observations and masks of the environment after some steps."""
    env = model.env.build(torch.device("cpu"), 7)
    obs, mask = env.reset()
    for _ in range(10):
        result = env.step(act(model, obs, mask))
        obs, mask = result.obs, result.action_mask
    choice = torch.arange(samples) % 4

    def rows(value):
        return None if value is None else value[choice]

    return {k: rows(v) for k, v in obs.items()} if isinstance(obs, dict) else rows(obs), rows(mask)


@torch.no_grad()
def act(model, obs, mask):
    seen = prepare_obs(obs, model.obs_normalizer)
    return model.policy.to_env(model.policy.act_deterministically(seen, mask))


LIGHT = [pytest.param(name, marks=[pytest.mark.slow] * (name == "growth")) for name in CASES]
"""Every case; that of growing networks, with the largest network by far, is slow."""


@pytest.mark.parametrize(
    ("case", "normalize_obs"), [*((case, True) for case in CASES), ("CartPole", False)]
)
def test_a_torch_program_acts_like_the_original(trained, tmp_path, case, normalize_obs):
    model = trained(case, normalize_obs=normalize_obs)
    exported = export_policy(model, tmp_path / "x.pt2", "torch")
    assert exported.difference <= 1e-6
    policy = torch.export.load(tmp_path / "x.pt2").module()
    for samples in (1, 4, 37):
        obs, mask = seen_by(model, samples)
        action = policy(obs) if mask is None else policy(obs, mask)
        torch.testing.assert_close(action, act(model, obs, mask), rtol=1e-6, atol=1e-6)
        assert not action.requires_grad


@pytest.mark.parametrize("case", LIGHT)
def test_an_onnx_file_acts_like_the_original(trained, tmp_path, case):
    model = trained(case, normalize_obs=True)
    exported = export_policy(model, tmp_path / "x.onnx", "onnx")
    assert exported.difference <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for samples in (1, 4, 37):
        obs, mask = seen_by(model, samples)
        named = dict(obs) if isinstance(obs, dict) else {"obs": obs}
        named |= {} if mask is None else {"action_mask": mask}
        assert {i.name for i in session.get_inputs()} == set(named)
        (action,) = session.run(["action"], {name: value.numpy() for name, value in named.items()})
        expected = act(model, obs, mask)
        torch.testing.assert_close(torch.from_numpy(action), expected, rtol=1e-5, atol=1e-5)


def loaded(path, file_format):
    """The exported file as a function of observations, masks or ``None``, and memory."""
    if file_format == "torch":
        program = torch.export.load(path).module()

        def run(obs, mask, memory):
            return program(*[obs] if mask is None else [obs, mask], memory=memory)

        return run
    session = onnxruntime.InferenceSession(path)

    def run(obs, mask, memory):
        named = {**(obs if isinstance(obs, dict) else {"obs": obs}), "memory": memory}
        named |= {} if mask is None else {"action_mask": mask}
        arrays = {name: value.numpy() for name, value in named.items()}
        return map(torch.from_numpy, session.run(["action", "next_memory"], arrays))

    return run


@pytest.mark.parametrize(
    ("case", "file_format"),
    [
        ("CartPole, GRU", "torch"),
        ("groups and masks, LSTM", "torch"),
        pytest.param("growth, GRU", "torch", marks=pytest.mark.slow),
        ("CartPole, GRU", "onnx"),
        pytest.param("growth, LSTM", "onnx", marks=pytest.mark.slow),
    ],
)
def test_memory_that_the_caller_carries_gives_the_original_actions(
    trained, tmp_path, case, file_format
):
    """The caller passes zeros where an episode ended; the original sees whole sequences."""
    model = trained(case, normalize_obs=True)
    generator = torch.Generator().manual_seed(0)
    for p in model.policy.parameters():  # else some do the same at every step
        p.data.normal_(0.0, 0.5, generator=generator)
    exported = export_policy(model, tmp_path / "x", file_format)
    assert exported.difference <= 1e-5
    run = loaded(tmp_path / "x", file_format)
    env = model.env.build(torch.device("cpu"), 7)
    obs, mask = env.reset()
    blank = memory = torch.zeros(4, model.policy.memory_size)
    ended, steps = torch.zeros(4, dtype=torch.bool), []
    for _ in range(20):
        memory = memory.masked_fill(ended[:, None], 0.0)
        action, memory = run(obs, mask, memory)
        steps.append(
            (
                prepare_obs(obs, model.obs_normalizer),
                mask,
                ended,
                action,
                memory,
            )
        )
        result = env.step(action)
        obs, mask, ended = result.obs, result.action_mask, result.terminated | result.truncated
    obs, mask, ended, action, memory = zip(*steps, strict=True)
    assert 0 < torch.stack(ended).sum() < 40
    if isinstance(obs[0], dict):
        obs = {name: torch.cat([o[name] for o in obs]) for name in obs[0]}
    else:
        obs = torch.cat(obs)
    mask = None if mask[0] is None else torch.cat(mask)
    with torch.no_grad():
        seen, expected = model.policy.unroll_memory(obs, blank, torch.cat(ended))
        best = model.policy.act_deterministically(seen, mask)
    torch.testing.assert_close(torch.cat(memory), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat(action), model.policy.to_env(best))
    assert len(best.unique(dim=0)) > 1


def test_an_export_is_read_without_this_package(trained, tmp_path):
    model = trained()
    path = tmp_path / "x.pt2"
    export_policy(model, path, "torch")
    program = f"""
import sys
sys.modules["esper_lightning"] = sys.modules["lightning"] = None
import torch
print(torch.export.load({str(path)!r}).module()(torch.zeros(3, 4)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().strip() == str(act(model, torch.zeros(3, 4), None).tolist())


def test_an_export_names_its_inputs_and_outputs(trained, tmp_path, caplog, recwarn):
    exported = export_policy(trained("groups and masks, LSTM"), tmp_path / "x.onnx", "onnx")
    inputs, outputs = (
        {name: (value.dtype, value.shape[1:]) for name, value in tensors.items()}
        for tensors in (exported.inputs, exported.outputs)
    )
    assert inputs == {
        "position": (torch.float64, (2,)),
        "speed": (torch.float64, (2,)),
        "action_mask": (torch.bool, (5,)),
        "memory": (torch.float32, (16,)),
    }
    assert outputs == {"action": (torch.int64, (2,)), "next_memory": (torch.float32, (16,))}
    assert exported.samples == 1024
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert [warning for warning in recwarn if "treespec" not in str(warning.message)] == []


@pytest.mark.parametrize("file_format", ["torch", "onnx"])
def test_what_acts_differently_is_not_written(trained, tmp_path, monkeypatch, file_format):
    path, model = tmp_path / "x", trained("clipped")
    export_policy(model, path, file_format)
    earlier, true = path.read_bytes(), export._program

    def wrong(policy, example):
        policy = export.DeterministicPolicy(model)  # of another bias
        policy.policy.action_head.mean.bias.data += 0.01
        return true(policy, example)

    monkeypatch.setattr(export, "_program", wrong)
    with pytest.raises(
        ValueError, match="The exported policy must act like the original on random"
    ):
        export_policy(model, path, file_format)
    assert path.read_bytes() == earlier


def test_what_torch_says_about_a_network_is_one_line(trained, tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise RuntimeError("\x1b[31mCould not guard on data\x1b[0m\nPlease open an issue\n")

    monkeypatch.setattr(torch.export, "export", refused)
    line = "got RuntimeError: Could not guard on data. forward() may neither branch on numbers nor"
    with pytest.raises(ValueError, match=re.escape(line)) as error:
        export_policy(trained("clipped"), tmp_path / "policy.pt2", "torch")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_remembers_differently_is_not_written(trained, tmp_path, monkeypatch):
    true = export._program

    def wrong(policy, example):
        policy = export.DeterministicPolicy(model)
        policy.policy.from_memory.bias.data += 1e-4
        return true(policy, example)

    model = trained("CartPole, GRU")
    monkeypatch.setattr(export, "_program", wrong)
    with pytest.raises(ValueError, match=r"a difference of \S+ in next_memory"):
        export_policy(model, tmp_path / "x", "torch")
    assert list(tmp_path.glob("x*")) == []


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        (Discrete(5), [5]),
        (NotADataclass().spaces().action, [2, 3]),
        (GROWTH.spaces().action, [5, 2, 2, 2, 2, 2, 7, 2]),  # a slot's for each of 5 ops
    ],
)
def test_masks_are_random_and_allow_something(space, parts):
    generator = torch.Generator().manual_seed(0)
    example = Inputs(torch.zeros(4, 2), torch.ones(4, sum(parts), dtype=torch.bool))
    mask = export._random_inputs(example, space, 1000, generator).action_mask
    for part in mask.split(parts, 1):
        assert part.any(1).all()
        assert (~part).any(1).sum() > 200


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_random_inputs_are_of_the_environments_scale(mean):
    generator = torch.Generator().manual_seed(0)
    example = Inputs(torch.full((4, 3), mean), memory=torch.zeros(4, 3))
    obs, _, memory = export._random_inputs(example, None, 1000, generator)
    assert obs.mean().item() == pytest.approx(mean, abs=0.2 * max(mean, 1.0))
    assert obs.std().item() == pytest.approx(max(mean, 1.0), rel=0.1)
    assert memory.std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_packages_that_are_missing_are_named(trained, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    message = r"--format onnx needs onnx and onnxscript: .* pip install 'esper_lightning\[export\]'"
    with pytest.raises(ValueError, match=message):
        export_policy(trained(), tmp_path / "x.onnx", "onnx")


@pytest.mark.parametrize("name", ["action_mask", "memory", "action", "next_memory"])
def test_a_group_with_the_name_of_another_input_is_refused(name):
    zeros = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=f"^Group of observations must not be .*{name}"):
        _ = Inputs({name: zeros}, zeros.bool(), zeros).named
    if name != "action":  # of which these have none
        assert [*Inputs({name: zeros}).named] == [name]


def test_unknown_formats_and_impossible_places_are_refused(trained, tmp_path):
    model = trained()
    with pytest.raises(ValueError, match=r"^--format must be one of torch, onnx, got 'tflite'"):
        export_policy(model, tmp_path / "x", "tflite")
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    torch.save({}, tmp_path / "best.ckpt")
    names = ["", "file", "file/x", "fifo", "dangling", "best.ckpt", "a\0b", "x" * 300, "/proc/x/y"]
    for name in names:
        rule = r"^--output must name a new file or an earlier export, got '"
        with pytest.raises(ValueError, match=rule):
            export_policy(model, tmp_path / name, "torch")
    assert (tmp_path / "fifo").is_fifo()
    assert (tmp_path / "dangling").is_symlink()


@pytest.mark.parametrize("file_format", ["torch", "onnx"])
def test_an_earlier_export_is_replaced_through_a_link_that_stays(trained, tmp_path, file_format):
    model, link = trained(), tmp_path / "link"
    link.symlink_to("policy")
    export_policy(model, tmp_path / "policy", file_format)
    before = (tmp_path / "policy").stat().st_ino
    export_policy(model, link, "torch")
    assert link.is_symlink()
    assert (tmp_path / "policy").stat().st_ino != before


def test_the_model_stays_as_it_was(trained, tmp_path):
    model = trained(normalize_obs=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_policy(model, tmp_path / "x.pt2", "torch")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.policy.parameters())
    assert model.ppo == dataclasses.replace(model.ppo)
