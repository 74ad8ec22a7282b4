"""What is added to PPO: rewards, terms of the loss and metrics, from rollout to checkpoint."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from esper_lightning import MLP, PPO, RND, PPOConfig, Recurrent
from esper_lightning.cli.main import main
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.core.running_stats import RunningStats
from esper_lightning.core.tensor_trees import named_tensors
from esper_lightning.envs import CartPole
from esper_lightning.ppo import Extension, ExtensionSpec, Prepared
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.extension import Extensions
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.optimizer import build_optimizer
from esper_lightning.train import train_ppo_vectorized
from esper_lightning.training.checkpoint.states import load_weights
from esper_lightning.training.export import export_policy

CPU = torch.device("cpu")
STEPS, ENVS = 8, 4
SPEC = CartPole(num_envs=ENVS, time_limit=5)
CONFIG = PPOConfig(rollout_steps=STEPS, minibatches=2, epochs=1)
ONE_STEP = PPOConfig(rollout_steps=STEPS, minibatches=1, epochs=1, max_grad_norm=None)
BRIEF = PPOConfig(rollout_steps=STEPS, minibatches=2, epochs=2, normalize_obs=True)
SMALL = MLP(hidden_sizes=(8,))
HERE = "tests.ppo.test_extension"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(ExtensionSpec):
    """A reward, a loss and a parameter of which everything can be computed by hand."""

    several = True
    scale: float = 1.0
    name: str = "toy"

    def build(self, spaces, generator):
        return ToyExtension(self, spaces, generator)


class ToyExtension(Extension):
    def __init__(self, spec, spaces, generator):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.randn((), generator=generator))
        self.unused = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("rollouts", torch.zeros((), dtype=torch.float64))

    def prepare(self, rollout, *, healthy, ranks, generator):
        self.rollouts += healthy
        reward = self.spec.scale * rollout.reached_obs[..., 0]
        return Prepared(reward, {"obs": rollout.obs}, {f"{self.spec.name}/reward": reward.mean()})

    def losses(self, batch, kept, evaluate):
        return {self.spec.name: self.weight * kept["obs"][:, 1]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Symmetry(ExtensionSpec):
    """The pole in a mirror is to be balanced by the mirrored push."""

    weight: float = 1.0

    def build(self, spaces, generator):
        return SymmetryExtension(self.weight)


class SymmetryExtension(Extension):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def losses(self, batch, kept, evaluate):
        mirrored = evaluate(batch._replace(obs=-batch.obs, action=1 - batch.action))
        return {"symmetry": self.weight * (evaluate(batch).log_prob - mirrored.log_prob).square()}


class Misplaced(Extension):
    """A loss of zero if what was kept of a step comes with the sample of that step."""

    def prepare(self, rollout, *, healthy, ranks, generator):
        return Prepared(kept=(rollout.obs, None))

    def losses(self, batch, kept, evaluate):
        return {"misplaced": (kept[0] - batch.obs).abs().sum(-1)}


def make(*extensions: Extension, config=CONFIG, policy=SMALL, stats=None):
    built = policy.build(SPEC.spaces(), torch.Generator().manual_seed(0))
    added = Extensions(extensions)
    streams = {n: torch.Generator().manual_seed(2) for n in ("exploration", "sample_order")}
    agent, env = Agent(built, None, added), SPEC.build(CPU, 1)
    learner = Learner(SPEC, env, agent, config, stats, **streams, mode="off", device=CPU)
    learner.start(build_optimizer(built, config, added), None)
    return learner


def toy(scale=1.0, name="toy"):
    spec = Toy(scale=scale, name=name)
    return spec.build(SPEC.spaces(), torch.Generator().manual_seed(5))


@pytest.mark.parametrize("scaled", [False, True])
def test_rewards_are_added_after_scaling_and_before_the_advantages(scaled) -> None:
    config = dataclasses.replace(CONFIG, normalize_reward=scaled, gae_lambda=1.0)
    stats = [RunningStats(()) if scaled else None for _ in range(2)]
    learner = make(toy(2.0), toy(0.5, "other"), config=config, stats=stats[0])
    rollout = learner.rollout(STEPS)
    bonus = 2.5 * rollout.reached_obs[..., 0]
    got = learner.compute_targets(rollout)
    plain = make(config=config, stats=stats[1])
    whole = plain.rollout(STEPS)
    assert torch.equal(whole.reward, rollout.reward)
    scale = 1.0
    if scaled:
        plain.compute_targets(whole)
        scale = 1.0 / stats[1].moments.variance.sqrt().float()
        assert torch.equal(stats[0].mean, stats[1].mean)
        stats[1].load_state_dict(RunningStats(()).state_dict())
    reward = rollout.reward * scale + bonus
    other = make(config=dataclasses.replace(config, normalize_reward=False))
    expected = other.compute_targets(other.rollout(STEPS)._replace(reward=reward)).samples
    torch.testing.assert_close(got.samples.value_target, expected.value_target)
    torch.testing.assert_close(got.samples.advantage, expected.advantage, rtol=1e-4, atol=1e-5)
    assert {name for name in got.added if "/" in name} == {"toy/reward", "other/reward"}
    torch.testing.assert_close(got.added["toy/reward"], 0.8 * bonus.mean())


def test_a_term_of_the_loss_has_its_gradient_and_a_mean_in_the_metrics() -> None:
    extension = toy()
    learner = make(extension, config=ONE_STEP)
    weight, rollout = extension.weight.item(), learner.rollout(STEPS)
    plain = make(config=ONE_STEP)
    for each in (learner, plain):
        targets = each.compute_targets(rollout)._replace(added={})
        update = each.update(targets, learning_rate=1e-3)
        metrics = each.metrics(targets, update)
    assert update.added == {}
    mean = rollout.obs[..., 1].mean()
    learner = make(extension := toy(), config=ONE_STEP)
    update = learner.update(learner.compute_targets(learner.rollout(STEPS)), learning_rate=1e-3)
    adam = learner._parameters.state
    torch.testing.assert_close(adam.mean[-1], 0.1 * mean)
    torch.testing.assert_close(update.added["toy"], weight * mean)
    torch.testing.assert_close(extension.weight.detach(), torch.tensor(weight) - 1e-3 * mean.sign())
    torch.testing.assert_close(len(adam.mean), len(plain._parameters.state.mean) + 1)
    assert "loss/toy" not in metrics


@pytest.mark.parametrize("policy", [SMALL, Recurrent(encoder_sizes=(8,))])
def test_what_is_kept_of_a_step_comes_with_its_sample(policy) -> None:
    learner = make(Misplaced(), policy=policy)
    for _ in range(2):
        update = learner.update(learner.compute_targets(learner.rollout(STEPS)), learning_rate=1e-3)
        assert update.added["misplaced"] == 0.0


def test_a_term_reaches_the_policy_through_evaluate() -> None:
    def asymmetry(weight):
        config = dataclasses.replace(CONFIG, epochs=20, clip=0.9)
        learner = make(SymmetryExtension(weight), config=config)
        for _ in range(4):
            update = learner.update(
                learner.compute_targets(learner.rollout(STEPS)), learning_rate=3e-3
            )
        return update.added["symmetry"].item() / weight

    assert asymmetry(100.0) < 0.1 * asymmetry(1e-6)


def test_the_evaluation_of_the_loss_is_given_to_extensions(monkeypatch) -> None:
    """The policy evaluates the samples of a minibatch once, and the mirrored ones once."""
    learner, seen = make(SymmetryExtension(1.0)), []
    targets = learner.compute_targets(learner.rollout(STEPS))
    true = Agent.evaluate
    monkeypatch.setattr(Agent, "evaluate", lambda *a: seen.append(a[1].obs) or true(*a))
    learner.update(targets, learning_rate=1e-3)
    samples, mirrored = seen[:2]
    assert torch.equal(samples, -mirrored)
    assert len(seen) == 2 * CONFIG.epochs * CONFIG.minibatches


class Counting(Extension):
    """Counts rollouts in a buffer that each ``prepare`` replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def prepare(self, rollout, *, healthy, ranks, generator):
        self.count = self.count + 1.0
        return Prepared()

    def losses(self, batch, kept, evaluate):
        return {"count": self.count.expand(batch.log_prob.shape)}


def test_a_buffer_that_prepare_replaces_is_that_of_the_losses() -> None:
    learner = make(Counting())
    for iteration in (1, 2):
        targets = learner.compute_targets(learner.rollout(STEPS))
        added = learner.update(targets, learning_rate=1e-3).added
        assert added["count"] == iteration


def test_mistakes_of_an_extension_are_named() -> None:
    class Wrong(Extension):
        def prepare(self, rollout, *, healthy, ranks, generator):
            return Prepared(rollout.reward.flatten())

    learner = make(Wrong())
    with pytest.raises(ValueError, match=r"Wrong.prepare\(\).reward must have shape .*\[8, 4\]"):
        learner.compute_targets(learner.rollout(STEPS))
    learner = make(toy(), toy())
    with pytest.raises(
        ValueError, match=r"ToyExtension.prepare\(\).metrics must have names that no other"
    ):
        learner.compute_targets(learner.rollout(STEPS))
    with pytest.raises(ValueError, match=r"PPO.extensions must be extension specs, got 3"):
        PPO(SPEC, extensions=(3,))
    with pytest.raises(ValueError, match=r"^PPO.extensions must differ from .*, got \[RND\("):
        PPO(SPEC, extensions=[RND(), RND()])
    with pytest.raises(ValueError, match=r"^PPO.extensions must be of different .*'RND'\]. The n"):
        PPO(SPEC, extensions=[RND(), Toy(), RND(coefficient=2.0), Toy(name="second")])


@pytest.mark.parametrize(("prepared", "line"), [
    (lambda rollout: None, r"return a Prepared, got NoneType"),
    (lambda rollout: Prepared(kept=rollout.reward.T), r"kept must begin with \[T, B\] = \[8, 4\]"),
    (lambda rollout: Prepared(metrics={"healthy": rollout.reward.sum()}), r"names <owner>/<name>"),
    (lambda rollout: Prepared(metrics={"policy/kl": rollout.reward.sum()}), r"another owner than"),
    (lambda rollout: Prepared(metrics={"my/x": 1.0}), r"metrics\['my/x'\] must be a scalar tensor"),
])  # fmt: skip
def test_what_prepare_must_not_return_is_named(prepared, line) -> None:
    class Wrong(Extension):
        def prepare(self, rollout, *, healthy, ranks, generator):
            return prepared(rollout)

    learner = make(Wrong())
    with pytest.raises(ValueError, match=rf"^Wrong.prepare\(\).*{line}"):
        learner.compute_targets(learner.rollout(STEPS))


@pytest.mark.parametrize(("term", "line"), [
    (lambda batch: {"x": batch.log_prob.sum()}, r"Wrong.losses\(\)\['x'\] must have shape \[M\]"),
    (lambda batch: {"x": batch.log_prob[:, None]}, r"Wrong.losses\(\)\['x'\] must have shape"),
    (lambda batch: {"value": batch.log_prob}, r"must return other names than .*, got 'value'"),
])  # fmt: skip
def test_what_losses_must_not_return_is_named(term, line) -> None:
    class Wrong(Extension):
        def losses(self, batch, kept, evaluate):
            return term(batch)

    learner = make(Wrong())
    with pytest.raises(ValueError, match=line):
        learner.update(learner.compute_targets(learner.rollout(STEPS)), learning_rate=1e-3)


class Empty(Extension):
    """Adds nothing."""


@pytest.mark.parametrize(("built", "line"), [
    (nn.Linear(1, 1), r"return an Extension, got Linear.$"),
    (Empty(), r"return an extension that overrides prepare or losses, got Empty.$"),
])  # fmt: skip
def test_what_a_spec_must_not_build_is_named(built, line) -> None:
    class Builds(ExtensionSpec):
        def build(self, spaces, generator):
            return built

    with pytest.raises(ValueError, match=rf"^Builds.build\(\) must {line}"):
        PPO(SPEC, extensions=(Builds(),))


class Endless(Extension):
    def prepare(self, rollout, *, healthy, ranks, generator):
        return Prepared(rollout.reward / 0.0)


def test_a_reward_that_is_not_finite_is_that_of_the_extension() -> None:
    learner = make(Endless())
    before = learner.agent.weights.parameters.clone()
    rollout = learner.rollout(STEPS)
    targets = learner.compute_targets(rollout)
    update = learner.update(targets, learning_rate=1e-2)
    with pytest.raises(NonFiniteError, match=r"^Endless.prepare must return finite rewards, .* 7"):
        learner.to_host(rollout, targets, update, iteration=7)
    assert torch.equal(learner.agent.weights.parameters, before)


EXTENSIONS = {
    "rnd": (RND(hidden_sizes=(8,), features=4),),
    "several": (Toy(), Symmetry(), Toy(name="second")),
}


def history(model, trainer, **settings):
    rows = []
    step = type(model).training_step

    class Recording(type(model)):
        def training_step(self, *args):
            result = step(self, *args)
            rows.append({k: v for k, v in result["row"].items() if not k.startswith(TIMES)})
            return result

    model.__class__ = Recording
    trainer.fit(model, **settings)
    model.__class__ = PPO
    return rows


TIMES = ("time_s", "env_steps_per_s")


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_run_is_resumed_bit_for_bit(name, make_trainer, tmp_path) -> None:
    def model(iterations):
        steps = STEPS * ENVS * iterations
        return PPO(SPEC, MLP(), BRIEF, total_env_steps=steps, extensions=EXTENSIONS[name])

    whole = model(4)
    rows = history(whole, make_trainer())
    half, trainer, path = model(2), make_trainer(), tmp_path / "half.ckpt"
    trainer.fit(half)
    trainer.save_checkpoint(path)
    resumed, trainer = model(4), make_trainer()
    assert history(resumed, trainer, ckpt_path=path) == rows[2:]
    expected = dict(named_tensors(whole.state_dict()))
    assert any(name.startswith("extensions.") for name in expected)
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, expected[key]), key
    loaded = PPO.load_from_checkpoint(path)
    assert loaded.settings.extensions == EXTENSIONS[name]
    for key, value in half.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    trained = {k for k, p in half.extensions.named_parameters() if p.requires_grad}
    fresh = model(2)
    for key, value in fresh.extensions.named_parameters():
        assert torch.equal(value, half.extensions.get_parameter(key)) != (key in trained), key
    states = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    policy = len(list(half.policy.parameters()))
    assert len(states) == policy + len(trained)


def test_checkpoints_with_extensions_serve_where_there_are_none(make_trainer, tmp_path) -> None:
    model = PPO(SPEC, MLP(), BRIEF, total_env_steps=64, eval_episodes=2, extensions=(RND(),))
    trainer, path = make_trainer(), tmp_path / "x.ckpt"
    trainer.fit(model)
    trainer.save_checkpoint(path)
    plain = PPO.load_from_checkpoint(path, extensions=())
    assert len(plain.extensions) == 0
    weights = model.policy.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in plain.policy.state_dict().items())
    assert export_policy(plain, tmp_path / "policy.torch", "torch").difference <= 1e-4
    for extensions in ((), (Toy(),), (RND(features=3),)):
        settings = {"eval_episodes": 2, "extensions": extensions}
        other = PPO(SPEC, MLP(), BRIEF, seed=1, **settings)
        make_trainer(limit_val_batches=1.0).validate(other, ckpt_path=path, verbose=False)
        assert torch.equal(other.policy.state_dict()["actor.0.weight"], weights["actor.0.weight"])
        warm = PPO(SPEC, MLP(), BRIEF, warm_start=str(path), total_env_steps=32, **settings)
        make_trainer().fit(warm)
        assert warm.iteration == 1
        more = PPO(SPEC, MLP(), BRIEF, total_env_steps=128, **settings)
        with pytest.raises(ValueError, match=r"PPO.extensions must be the checkpoint's"):
            make_trainer().fit(more, ckpt_path=path)


def test_a_run_in_one_call_has_extensions_and_two_of_a_class_by_other_names(tmp_path) -> None:
    settings = {"iterations": 1, "ppo": CONFIG, "policy": SMALL, "device": "cpu"}
    two = (Toy(), Toy(name="other"))
    (row,) = train_ppo_vectorized(SPEC, run_dir=tmp_path / "run", extensions=two, **settings)
    assert math.isfinite(row["loss/toy"] + row["loss/other"] + row["other/reward"])


def test_a_warm_start_says_that_the_state_of_extensions_is_not_used(
    make_trainer, tmp_path, caplog
) -> None:
    model = PPO(SPEC, SMALL, BRIEF, total_env_steps=32, extensions=(Toy(),))
    trainer, path = make_trainer(), tmp_path / "x.ckpt"
    trainer.fit(model)
    trainer.save_checkpoint(path)
    line = f"PPO.warm_start: {path} is of other PPO.extensions, whose state is not used."
    for extensions, count in (((), 1), ((RND(),), 1), ((Toy(scale=2.0),), 0)):
        caplog.clear()
        load_weights(PPO(SPEC, SMALL, BRIEF, extensions=extensions), path)
        assert caplog.messages.count(line) == count


def test_an_extension_that_is_not_finite_is_no_matter_of_the_export(tmp_path) -> None:
    model = PPO(SPEC, SMALL, CONFIG, extensions=(Toy(),))
    with torch.no_grad():
        next(iter(model.extensions)).weight.fill_(math.nan)
    assert export_policy(model, tmp_path / "policy.torch", "torch").difference <= 1e-4


def test_a_parameter_of_another_dtype_is_named() -> None:
    extension = toy().double()
    message = r"^PPO.extensions must have float32 parameters .* cpu, got torch.float64 on cpu for "
    with pytest.raises(ValueError, match=message + r"extensions\.0\.weight\.$"):
        make(extension)


def test_without_extensions_nothing_is_saved_of_them() -> None:
    model = PPO(SPEC, MLP(), BRIEF)
    assert not any("extension" in name for name in model.state_dict())
    assert model.settings.to_data()["extensions"] == []
    data = model.settings.to_data()
    del data["extensions"]  # as earlier versions wrote it
    assert model.settings.from_data(data) == model.settings


@pytest.mark.slow
@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("name", EXTENSIONS)
def test_compiled_it_learns_the_same(name, make_trainer, caplog) -> None:
    def state(mode):
        model = PPO(
            SPEC, MLP(), BRIEF, total_env_steps=STEPS * ENVS * 3, compile=mode,
            extensions=EXTENSIONS[name],
        )  # fmt: skip
        rows = history(model, make_trainer())
        return model.state_dict(), rows[-1]

    (eager, row), (compiled, other) = state("off"), state("auto")
    assert "does not work" not in caplog.text
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4)
    assert other == pytest.approx(row, rel=1e-2, abs=1e-4)


class Unwilling(Extension):
    """A loss that no compiler understands."""

    def losses(self, batch, kept, evaluate):
        return {"zero": batch.value * float(batch.value.sum().item() * 0.0)}


@dataclasses.dataclass(frozen=True)
class UnwillingSpec(ExtensionSpec):
    def build(self, spaces, generator):
        return Unwilling()


@pytest.mark.slow
@pytest.mark.usefixtures("native_code")
def test_a_term_that_cannot_be_compiled_runs_eagerly_with_one_line(make_trainer, caplog) -> None:
    settings = {"total_env_steps": STEPS * ENVS * 2, "extensions": (UnwillingSpec(),)}
    model = PPO(SPEC, MLP(hidden_sizes=(4,)), CONFIG, **settings)
    rows = history(model, make_trainer())
    assert rows[-1]["loss/zero"] == 0.0
    said = [text for text in caplog.messages if "does not work for the update" in text]
    assert len(said) == 1


def test_yaml_names_them(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    extensions = [
        {"class_path": "esper_lightning.RND", "init_args": {"features": 3}},
        {"class_path": f"{HERE}.Toy", "init_args": {"scale": 0.5}},
    ]
    env = {"class_path": "CartPole", "init_args": {"num_envs": 4}}
    Path("config.yaml").write_text(
        yaml.safe_dump({"model": {"env": env, "extensions": extensions}})
    )
    brief = ["--model.ppo.rollout_steps", "4", "--model.ppo.minibatches", "1"]
    brief += ["--model.total_env_steps", "32", "--trainer.accelerator", "cpu"]
    brief += ["--trainer.enable_progress_bar", "false", "--model.eval_episodes", "2"]
    main(["fit", "--config", "config.yaml", *brief, "--run_dir", "run"])
    row = yaml.safe_load(Path("run/rank0/history.jsonl").read_text().splitlines()[-1])
    assert {"rnd/reward", "loss/rnd", "toy/reward", "loss/toy"} <= row.keys()
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    stored = last["hyper_parameters"]["extensions"]
    assert [each["class_path"] for each in stored] == [
        "esper_lightning.ppo.random_distillation.RND",
        f"{HERE}.Toy",
    ]
    assert stored[0]["init_args"]["features"] == 3
    more = ["--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
    main(["fit", *more, "--model.total_env_steps", "48", "--run_dir", "more"])
    stored[1]["class_path"] = "no.longer.Here"  # nothing but training needs it
    torch.save(last, "moved.ckpt")
    main(["evaluate", "--ckpt_path", "moved.ckpt", "--trainer.accelerator", "cpu"])
    main(["export", "--ckpt_path", "moved.ckpt", "--output", "policy.pt2"])
    last["hyper_parameters"]["extensions"] = [{"class_path": 3}]
    torch.save(last, "broken.ckpt")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", "--ckpt_path", "broken.ckpt", "--trainer.accelerator", "cpu"])
    assert "hyper_parameters.extensions.0.class_path" in capsys.readouterr().err
