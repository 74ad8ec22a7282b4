"""A checkpoint with valid checksums and wrong content is refused, by the name of what is wrong."""

import copy
import re

import pytest
import torch

from esper_lightning import PPO, PPOConfig, train_ppo_vectorized
from esper_lightning.envs import CartPole
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.states import load_checkpoint, load_weights

SETTINGS = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
WEIGHT = "policy.actor.0.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("checkpoints") / "run"
    train_ppo_vectorized(
        CartPole(num_envs=4), iterations=2, ppo=SETTINGS, device="cpu", run_dir=run
    )
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def weight_of(checkpoint) -> str:
    return next(name for name in checkpoint["state_dict"] if name.endswith("weight"))


def put(path: str, value):
    """A function that sets an entry of a checkpoint, or removes it for ``None``."""

    def change(checkpoint):
        *places, last = path.split(".")
        for place in places:
            checkpoint = checkpoint[int(place) if isinstance(checkpoint, list) else place]
        if value is None:
            del checkpoint[last]
        else:
            checkpoint[int(last) if isinstance(checkpoint, list) else last] = value

    return change


def weights(function):
    def change(checkpoint):
        name = weight_of(checkpoint)
        checkpoint["state_dict"][name] = function(checkpoint["state_dict"][name])

    return change


def moments(function):
    def change(checkpoint):
        state = checkpoint["optimizer_states"][0]["state"][0]
        state["exp_avg"] = function(state["exp_avg"])

    return change


def to_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = torch.nan
    return tensor


def itself(checkpoint):
    checkpoint["hyper_parameters"]["env"]["init_args"]["x"] = loop = []
    loop.append(loop)


PROGRAM = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "made"]}}
EVERYWHERE = {
    "no weights": (put("state_dict", None), "state_dict is missing"),
    "weights in a list": (put("state_dict", [1]), "state_dict is no dictionary"),
    "text for a weight": (weights(lambda _: "text"), "is a str"),
    "a sparse weight": (weights(torch.Tensor.to_sparse), "is a sparse tensor"),
    "no settings": (put("hyper_parameters", None), "hyper_parameters is missing"),
    "settings as text": (put("hyper_parameters", "text"), "hyper_parameters is no dictionary"),
    "no environment": (put("hyper_parameters.env", None), "hyper_parameters.env is missing"),
    "a tensor as a setting": (
        put("hyper_parameters.env.init_args.num_envs", torch.ones(1)),
        "hyper_parameters.env.init_args.num_envs holds a Tensor",
    ),
    "settings that hold themselves": (itself, "it is nested more than 100 deep"),
    "no counters": (put(f"{STATE_KEY}.iteration", None), f"{STATE_KEY}.iteration is missing"),
    "a bool as a counter": (put(f"{STATE_KEY}.env_steps", True), "env_steps is no count"),
    "a negative counter": (put(f"{STATE_KEY}.iteration", -1), "iteration is no count"),
    "a number as a version": (put("pytorch-lightning_version", 3), "version is a int"),
    "no version": (put("pytorch-lightning_version", "x"), "a version of Lightning"),
    "ranks in a list": (put(f"{STATE_KEY}.ranks", []), "ranks is a list"),
}
BUILT = {
    "a weight is missing": (lambda c: c["state_dict"].pop(weight_of(c)), "It lacks policy."),
    "a weight too many": (put("state_dict.more", torch.ones(1)), "It has more"),
    "a weight of another shape": (weights(lambda w: w[:1]), "of torch.float32, not"),
    "a weight without end": (
        weights(lambda _: torch.zeros(1).expand(10**12)),
        "[1000000000000] of torch.float32, not",
    ),
    "whole numbers": (weights(torch.Tensor.long), "of torch.int64, not"),
}
TO_RESUME = {
    "no optimizer": (put("optimizer_states", None), "optimizer_states is missing"),
    "no callbacks": (put("callbacks", None), "callbacks is missing"),
    "no loops": (put("loops", []), "loops is no dictionary"),
    "empty loops": (put("loops", {}), "loops.fit_loop is missing"),
    "moments of another shape": (moments(lambda m: m[:1]), "State 0 fits no weight"),
    "moments that are not finite": (moments(to_nan), "Not finite: optimizer.0.0.exp_avg"),
    "two optimizers": (
        lambda c: c["optimizer_states"].append(c["optimizer_states"][0]),
        "hold the state of one Adam",
    ),
    "no environments' state": (put(f"{STATE_KEY}.ranks", {0: []}), "ranks.0 is no dictionary"),
}


@pytest.fixture
def damaged(whole, tmp_path):
    def make(change):
        content = copy.deepcopy(whole)
        change(content)
        torch.save(content, tmp_path / "x.ckpt")
        return tmp_path / "x.ckpt"

    return make


def refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_wrong_content_is_named_by_whatever_reads_it(damaged, case):
    change, message = EVERYWHERE[case]
    path = damaged(change)
    refused(lambda: load_checkpoint(path), message)
    refused(lambda: PPO.load_from_checkpoint(path), message)
    refused(lambda: load_weights(PPO(CartPole(num_envs=4)), path), message)


@pytest.mark.parametrize("case", BUILT)
def test_weights_that_do_not_fit_are_named(damaged, case):
    change, message = BUILT[case]
    path = damaged(change)
    refused(lambda: load_weights(PPO(CartPole(num_envs=4)), path), message)
    model = PPO(CartPole(num_envs=4))
    checkpoint = load_checkpoint(path)
    refused(lambda: model.refuse_checkpoint(checkpoint, str(path), world_size=None), message)
    refused(lambda: PPO.load_from_checkpoint(path), message)


@pytest.mark.parametrize("case", TO_RESUME)
def test_training_is_not_resumed_from_what_lacks_its_state(damaged, make_trainer, case):
    change, message = TO_RESUME[case]
    path = damaged(change)
    model = PPO(CartPole(num_envs=4), ppo=SETTINGS)
    checkpoint = load_checkpoint(path)
    refused(lambda: model.refuse_checkpoint(checkpoint, str(path), world_size=1), message)
    model.refuse_checkpoint(checkpoint, str(path), world_size=None)
    PPO.load_from_checkpoint(path)


def test_weights_that_are_not_finite_are_of_no_use(damaged, make_trainer):
    path = damaged(weights(to_nan))
    name = weight_of(load_checkpoint(path))
    message = f"hold finite weights, got {str(path)!r}. Not finite: {name}."
    model = PPO(CartPole(num_envs=4), ppo=SETTINGS)
    refused(lambda: load_weights(model, path), message)
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    for method in ("fit", "validate"):
        trainer = make_trainer(max_steps=3, limit_val_batches=1)
        with pytest.raises(ValueError, match="hold finite weights"):
            getattr(trainer, method)(model, ckpt_path=path)
    looked_at = PPO.load_from_checkpoint(path)  # as evidence
    assert not bool(looked_at.state_dict()[name].isfinite().all())


def test_nothing_but_specs_is_built_from_a_checkpoint(damaged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("env", "policy"):
        path = damaged(put(f"hyper_parameters.{name}", PROGRAM))
        refused(lambda: PPO.load_from_checkpoint(path), "that subprocess.Popen builds: it is no")  # noqa: B023
    assert not (tmp_path / "made").exists()


def test_networks_greater_than_their_weights_are_not_built(damaged):
    path = damaged(put("hyper_parameters.policy.init_args.hidden_sizes", [65536, 65536]))
    refused(lambda: PPO.load_from_checkpoint(path), "must describe the networks of its weights")


def test_a_whole_checkpoint_is_never_refused(damaged):
    path = damaged(lambda _: None)
    model = PPO.load_from_checkpoint(path)
    model.refuse_checkpoint(load_checkpoint(path), str(path), world_size=1)
    load_weights(model, path)
