"""Policies that grow networks play beside baselines, and PPO trains them like any other policy."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from esper_lightning import MLP, PPO, FlightRecorder, PPOConfig, Recurrent
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.envs import Morphogenesis
from esper_lightning.envs.morphogenesis import MorphogenesisEnv
from esper_lightning.envs.morphogenesis.baselines import BASELINES
from esper_lightning.envs.morphogenesis.lifecycle import LIVE, Stage, is_in
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.growth.play import fresh_hosts, play, play_baselines, play_trained
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.ppo.evaluation import evaluate_policy
from tests.reports import read_report

CPU = torch.device("cpu")
EPOCHS = 6
SPEC = Morphogenesis.synthetic(
    num_envs=4,
    image=(1, 4),
    channels=(4, 4),
    kernels=(3, 1),
    pools=(2, 1),
    classes=3,
    epochs=EPOCHS,
    train_batches=2,
    batch_size=8,
    validation_size=32,
    ramp_epochs=(3, 4),
)
POLICIES = {"MLP": MLP(hidden_sizes=(8,)), "Recurrent": Recurrent(memory_size=8)}


def make_model(policy="MLP", **settings) -> PPO:
    ppo = PPOConfig(rollout_steps=5, minibatches=2, epochs=1)
    return PPO(SPEC, POLICIES[policy], ppo, eval_episodes=5, **settings)


def make_env(model):
    with fresh_hosts(model.env, hosts=5, device=CPU, seed=3) as env:
        return env


def test_hosts_are_closed_when_nobody_plays_on_them_any_more(monkeypatch):
    closed = []
    monkeypatch.setattr(
        MorphogenesisEnv, "close", lambda self: closed.extend([self]), raising=False
    )
    with fresh_hosts(SPEC, hosts=2, device=CPU, seed=3) as env:
        assert closed == []
    assert closed == [env]


def test_an_evaluation_on_a_cpu_ends_with_the_last_episode():
    model, env, steps = make_model(), SPEC.build(CPU, 1), []
    step = env.step
    env.step = lambda action: steps.append(None) or step(action)
    evaluate_policy(model.policy, partial(prepare_obs, normalizer=model.obs_normalizer), env)
    assert len(steps) == EPOCHS


@pytest.mark.parametrize("name", BASELINES)
def test_figures_are_those_of_a_longer_episode_stopped_by_hand(name):
    """In an episode that continues, all numbers can be read from the hosts."""
    baseline = BASELINES[name]
    env = SPEC.build(CPU, 1)
    played = play(env, lambda obs, mask: baseline(env))
    longer = dataclasses.replace(SPEC, epochs=EPOCHS + 1).build(CPU, 1)
    longer.reset()
    total = torch.zeros(4)
    for t in range(EPOCHS):
        action = baseline(longer)
        total += longer.step(action).reward
        slots, vitals = longer.hosts.slots, longer.hosts.vitals
        shown = torch.where(is_in(slots.stage, LIVE), slots.blueprint, 0)
        assert torch.equal(played.course.action[t], action)
        assert torch.equal(played.course.stage[t], slots.stage)
        assert torch.equal(played.course.alpha[t], slots.alpha)
        assert torch.equal(played.course.blueprint[t], shown)
        assert torch.equal(played.course.accuracy[t], vitals.accuracies[:, 0])
        torch.testing.assert_close(played.course.loss[t], vitals.losses[:, 0])
    torch.testing.assert_close(played.episode_return, total)
    assert torch.equal(played.test_accuracy, longer.test_accuracy())
    assert torch.equal(played.grown_parameters, longer.grown_parameters(longer.hosts.slots))
    assert played.episode_length.tolist() == [EPOCHS] * 4
    assert not played.diverged.any()
    assert (played.grown_parameters.sum() == 0) == (name == "never grow")


def test_of_a_host_that_diverges_its_first_episode_counts():
    env, epochs = SPEC.build(CPU, 1), []

    def poison(obs, mask):
        epochs.append(None)
        if len(epochs) in (3, 5):  # the second time it is another host
            env.hosts.weights.host[1] = math.nan
        return BASELINES["never grow"](env)

    played = play(env, poison)
    assert played.diverged.tolist() == [False, True, False, False]
    assert played.episode_length.tolist() == [EPOCHS, 3, EPOCHS, EPOCHS]
    well = play(SPEC.build(CPU, 1), lambda obs, mask: torch.zeros(4, 4, dtype=torch.int64))
    gained = SPEC.gain_weight * (well.course.accuracy[1, 1] - 1 / 3)  # in the epochs before
    torch.testing.assert_close(played.episode_return[1], gained + SPEC.divergence_penalty)
    others = [0, 2, 3]
    assert torch.equal(played.episode_return[others], well.episode_return[others])


@pytest.mark.parametrize("policy", POLICIES)
def test_everyone_meets_the_same_hosts(policy):
    model, generator = make_model(policy), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.policy.parameters():  # so that much decides, memory too
            weight.copy_(torch.randn(weight.shape, generator=generator))
    env = make_env(model)
    ppo, drawn = (one for _, one in play_trained(model, env))
    alone = evaluate_policy(
        model.policy, partial(prepare_obs, normalizer=model.obs_normalizer), make_env(model)
    )
    assert torch.equal(ppo.episode_return, alone.episode_return)
    assert torch.equal(ppo.episode_length, alone.episode_length)
    assert (ppo.course.stage == Stage.BLENDING).any()
    assert not torch.equal(ppo.course.action, drawn.course.action)
    again = dict(play_trained(model, env))  # who came before changes nothing
    assert torch.equal(again["PPO, actions drawn"].episode_return, drawn.episode_return)


def test_baselines_meet_them_too():
    model = make_model()
    found, env = dict(play_baselines(make_env(model))), make_env(model)
    for name in ("plateau", "random legal"):  # the other way round
        env.load_state_dict(make_env(model).state_dict())
        expected = play(env, lambda obs, mask, act=BASELINES[name]: act(env))
        assert torch.equal(found[name].episode_return, expected.episode_return)


class _Rows(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        timed = ("time_s", "env_steps_per_s")
        self.rows.append({k: v for k, v in outputs["row"].items() if k not in timed})


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_goes_on_in_the_middle_of_blending(make_trainer, tmp_path, policy):
    def fit(budget, ckpt_path=None):
        rows, model = _Rows(), make_model(policy, total_env_steps=budget)
        trainer = make_trainer(callbacks=[rows])
        trainer.fit(model, ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{budget}.ckpt")
        return model, rows.rows

    whole, expected = fit(4 * 20)
    assert [row["env_steps"] for row in expected] == [20, 40, 60, 80]
    assert all(math.isfinite(row["loss/policy"]) for row in expected)
    fit(2 * 20)
    path = tmp_path / "40.ckpt"
    saved = torch.load(path, weights_only=True)["esper_lightning"]["ranks"][0]["env"]
    assert (saved["slots.stage"] == Stage.BLENDING).any()
    resumed, rows = fit(4 * 20, path)
    assert repr(rows) == repr(expected[2:])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    ends = (one._learner.state_dict()["env"] for one in (whole, resumed))
    for one, other in zip(*(end.values() for end in ends), strict=True):
        assert torch.equal(one, other)


class _Poison(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            module._learner._env.hosts.vitals.accuracies[2, 0] = math.nan


def test_a_nan_is_reported_with_the_hosts_it_is_of(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[_Poison(), FlightRecorder(tmp_path)])
    with pytest.raises(NonFiniteError, match=r"environment 2.*at rollout step 0"):
        trainer.fit(make_model(total_env_steps=4 * 20))
    found = read_report(RunLayout(tmp_path).rank(0).crash)["error"]["non_finite"]
    assert found["environments"] == [2]
    assert found["phase"] == "rollout"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_history_says_what_rewards_were_made_of(make_trainer, precision):
    rows = []

    class Remember(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            rows.append(outputs["row"])

    ppo = PPOConfig(rollout_steps=EPOCHS, minibatches=2, epochs=1)
    model = PPO(SPEC, POLICIES["MLP"], ppo, total_env_steps=3 * EPOCHS * SPEC.num_envs)
    make_trainer(callbacks=[Remember()], limit_val_batches=0, precision=precision).fit(model)
    assert len(rows) == 3
    totals = []
    for row in rows:
        terms = [value for name, value in row.items() if name.startswith("env/reward_")]
        assert len(terms) == 5
        totals.append(EPOCHS * sum(terms))  # a rollout is an episode
    mean = sum(totals) / 3  # every episode so far counts
    assert rows[-1]["rollout/episode_return_mean"] == pytest.approx(mean, rel=1e-4, abs=1e-5)
    assert any(row["env/grown_parameters"] > 0 for row in rows)
    assert all(row["env/diverged"] == 0 for row in rows)
