"""Policies of every kind through a whole run: training, checkpoints, evaluation, export, YAML."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from esper_lightning import CNN, PPO, Composed, PPOConfig, Recurrent, train_ppo_vectorized
from esper_lightning.cli.main import main
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.envs.autoreset import AutoresetEnv, Transition
from esper_lightning.envs.base import EnvSpec
from esper_lightning.envs.frame_stack import FrameStack
from esper_lightning.policies import Flat, Groups, Image, Imported, PolicySpec
from esper_lightning.training.export import export_policy
from esper_lightning.training.specs import spec_from_data
from tests.envs.pictures import Pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class BrightSide(EnvSpec):
    """An image of bytes with a bright patch somewhere: on the left (0), or on the right (1)?

    An answer ends the episode: +1 if it is right, else -1.
    """

    num_envs: int = 32
    size: int = 8  # pixels
    time_limit: int = 10

    def spaces(self) -> EnvSpaces:
        shape = (1, self.size, self.size)
        return EnvSpaces(obs=Box(shape, low=0.0, high=255.0), action=Discrete(2))

    def build(self, device, seed) -> AutoresetEnv:
        return AutoresetEnv(self, device=device, seed=seed)

    def sample_states(self, steps, generator, device) -> Tensor:
        places = (steps, self.num_envs, 2)
        return torch.randint(self.size, places, generator=generator, device=device).float()

    def observe(self, state: Tensor) -> Tensor:
        pixels = torch.arange(self.size, device=state.device)
        x, y = (((axis[:, None] - pixels).abs() < 1.5).float() for axis in state.unbind(-1))
        return (y[:, :, None] * x[:, None, :] * 255.0)[:, None]

    def advance(self, state: Tensor, action: Tensor) -> Transition:
        right = (action == 1) == (state[:, 0] >= self.size / 2)
        return Transition(state, torch.where(right, 1.0, -1.0), torch.ones_like(right))


class Columns(nn.Module):
    """A user's network: what is bright in which column."""

    def __init__(self, space: Box, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(space.shape[-1], width)

    def forward(self, obs: Tensor) -> Tensor:
        return self.layer(obs.mean((1, 2)) / 255.0).relu()


HERE = "test_policies_networks:Columns"
IMAGE = {"channels": (8,), "kernels": (3,), "strides": (2,), "hidden_sizes": (16,)}
POLICIES = {
    "CNN": CNN(**IMAGE),
    "Composed": Composed(encoder=HERE, encoder_args={"width": 16}),
    "Recurrent with images": Recurrent(
        memory_size=8, encoder=Image(**IMAGE), encoder_sizes=(), hidden_sizes=(16,)
    ),
    "Recurrent with one's own": Recurrent(
        memory_size=8, encoder=Imported(path=HERE, args={"width": 16}), hidden_sizes=(16,)
    ),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
LEARNS = PPOConfig(rollout_steps=16, minibatches=2, learning_rate=5e-3, entropy_coef=0.001)
BRIEF = PPOConfig(rollout_steps=4, minibatches=2, epochs=1)


@pytest.fixture(autouse=True)
def _users_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "test_policies_networks", sys.modules[__name__])


@each_policy
def test_policies_of_every_kind_learn(make_trainer, policy):
    model = PPO(BrightSide(), policy, LEARNS, total_env_steps=16 * 32 * 30)
    make_trainer().fit(model)
    (metrics,) = make_trainer(limit_val_batches=1.0).validate(model, verbose=False)
    assert metrics["eval/episode_return_mean"] > 0.9


def test_normalised_bytes_are_not_scaled_again(make_trainer):
    spaces = BrightSide().spaces()
    ppo = dataclasses.replace(BRIEF, normalize_obs=True)
    scaled, plain = (PPO(BrightSide(num_envs=2), CNN(**IMAGE), p) for p in (BRIEF, ppo))
    obs = torch.full((1, *spaces.obs.shape), 255.0)
    torch.testing.assert_close(scaled.policy.value(obs), plain.policy.value(obs / 255.0))


@each_policy
@pytest.mark.slow
@pytest.mark.usefixtures("native_code")
def test_compiled_training_learns_the_same(make_trainer, policy, caplog):
    def weights(mode):
        env = BrightSide(num_envs=8)
        model = PPO(env, policy, BRIEF, total_env_steps=8 * 4 * 3, compile=mode)
        make_trainer().fit(model)
        return model.policy.state_dict()

    eager, compiled = weights("off"), weights("auto")
    assert "does not work" not in caplog.text
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, id=name, marks=[pytest.mark.slow] * name.startswith("Recurrent"))
        for name, policy in POLICIES.items()
    ],
)
def test_a_checkpoint_is_resumed_and_exported(tmp_path, monkeypatch, policy):
    monkeypatch.chdir(tmp_path)
    env = BrightSide(num_envs=4)
    settings = {"ppo": BRIEF, "policy": policy, "device": "cpu"}
    whole = train_ppo_vectorized(env, iterations=4, run_dir="whole", **settings)
    train_ppo_vectorized(env, iterations=2, run_dir="half", save_path="half.ckpt", **settings)
    rest = train_ppo_vectorized(
        env, iterations=4, run_dir="rest", resume_path="half.ckpt", **settings
    )
    assert rest[-1]["loss/value"] == whole[-1]["loss/value"]
    model = PPO.load_from_checkpoint("half.ckpt")
    assert model.hparams["policy"]["init_args"].keys() == {
        field.name for field in dataclasses.fields(policy)
    }
    for name in ("torch", "onnx"):
        assert export_policy(model, f"policy.{name}", name).difference <= 1e-4


STACKED = FrameStack(env=Pictures(shape=(6, 6, 1), grouped=True, num_envs=2), frames=2)
OF_BYTES: dict[str, PolicySpec] = {
    "impala": CNN(kind="impala", channels=(4,), hidden_sizes=(8,)),
    "groups": Composed(
        encoder=Groups(encoders={"image": Image(**IMAGE)}),
        critic_encoder=Groups(encoders={"image": Image(**IMAGE), "vector": Flat()}),
        trunk="separate",
    ),
    "recurrent": Recurrent(memory_size=8, encoder=Image(**IMAGE), encoder_sizes=()),
}


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, id=name, marks=[pytest.mark.slow] * (name != "groups"))
        for name, policy in OF_BYTES.items()
    ],
)
def test_stacked_images_of_bytes_are_resumed_and_exported(tmp_path, monkeypatch, policy):
    monkeypatch.chdir(tmp_path)
    settings = {"ppo": BRIEF, "policy": policy, "device": "cpu"}
    whole = train_ppo_vectorized(STACKED, iterations=4, run_dir="whole", **settings)
    train_ppo_vectorized(STACKED, iterations=2, run_dir="half", save_path="half.ckpt", **settings)
    rest = train_ppo_vectorized(
        STACKED, iterations=4, run_dir="rest", resume_path="half.ckpt", **settings
    )
    assert rest[-1]["loss/value"] == whole[-1]["loss/value"]
    model = PPO.load_from_checkpoint("half.ckpt")
    assert model.env == STACKED
    for name in ("torch", "onnx"):
        assert export_policy(model, f"policy.{name}", name).difference <= 1e-4


def test_a_config_can_name_policies_of_every_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("networks_of_mine.py").write_text(
        "from torch import nn\ndef make(space, width):\n    return nn.Linear(space.size, width)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    encoder = {"path": "networks_of_mine:make", "args": {"width": 3}}
    composed = {"encoder": "networks_of_mine:make", "encoder_args": {"width": 3}}
    specs = {
        "composed": {"class_path": "esper_lightning.policies.Composed", "init_args": composed},
        "recurrent": {
            "class_path": "Recurrent",
            "init_args": {"encoder": {"class_path": "Imported", "init_args": encoder}},
        },
    }
    brief = ["--model.ppo.rollout_steps", "4", "--model.ppo.minibatches", "1"]
    brief += ["--model.total_env_steps", "32", "--trainer.accelerator", "cpu"]
    brief += ["--trainer.enable_progress_bar", "false", "--model.eval_episodes", "2"]
    for name, spec in specs.items():
        model = {"env": {"class_path": "CartPole", "init_args": {"num_envs": 4}}, "policy": spec}
        Path("config.yaml").write_text(yaml.safe_dump({"model": model}))
        main(["fit", "--config", "config.yaml", *brief, "--run_dir", name])
        main(["evaluate", "--ckpt_path", name, "--trainer.accelerator", "cpu"])
        assert len(Path(name, "rank0/history.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    few = ["--model.env", "CartPole", "--model.env.num_envs", "4"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *few, "--model.policy", "CNN", *brief])
    assert ended.value.code == 2
    assert "CNN must see images of three axes, got [4]." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", *few, "--model.policy", "CNM", *brief])
    said = capsys.readouterr().err
    assert all(name in said for name in ("CNN", "Composed", "MLP", "Recurrent"))
    assert len(said.splitlines()) == 1


def test_a_config_can_name_encoders_of_groups_and_environments_within(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = {"class_path": "Image", "init_args": {"kind": "impala", "channels": [4]}}
    groups = {"encoders": {"image": image, "vector": {"class_path": "Flat"}}}
    within = {"shape": [6, 6, 1], "grouped": True, "num_envs": 2}
    within = {"class_path": "tests.envs.pictures.Pictures", "init_args": within}
    model = {
        "env": {"class_path": "FrameStack", "init_args": {"env": within, "frames": 2}},
        "policy": {
            "class_path": "Composed",
            "init_args": {"encoder": {"class_path": "Groups", "init_args": groups}},
        },
        "ppo": {"rollout_steps": 4, "minibatches": 1},
        "total_env_steps": 16,
        "eval_episodes": 2,
    }
    Path("config.yaml").write_text(yaml.safe_dump({"model": model}))
    brief = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", "config.yaml", *brief, "--run_dir", "run"])
    main(["evaluate", "--ckpt_path", "run", "--trainer.accelerator", "cpu"])
    assert len(Path("run/rank0/history.jsonl").read_text().splitlines()) == 2
    model["env"]["init_args"]["env"]["init_args"]["num_envs"] = 3
    Path("config.yaml").write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "config.yaml", *brief, "--ckpt_path", "run"])
    assert ended.value.code == 2


def test_specs_within_specs_are_rebuilt():
    policy = POLICIES["Recurrent with one's own"]
    model = PPO(BrightSide(num_envs=2), policy, BRIEF)
    encoder = model.settings.to_data()["policy"]["init_args"]["encoder"]
    assert encoder == {
        "class_path": "esper_lightning.policies.composed.Imported",
        "init_args": {"path": HERE, "args": {"width": 16}},
    }
    assert (
        spec_from_data(model.settings.to_data()["policy"], owner="policy", kind=PolicySpec)
        == policy
    )
