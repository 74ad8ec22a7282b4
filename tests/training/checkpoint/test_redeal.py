"""Environments of a checkpoint that are dealt anew: none is lost, and streams are new."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.envs import Acrobot, CartPole, FrameStack, Morphogenesis
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.redeal import deal_rank, refuse_deal
from esper_lightning.training.settings import PPOSettings
from tests.training.test_ranks import history, run

CPU = torch.device("cpu")


def ppo(env, *, iterations=3, **settings) -> PPO:
    config = PPOConfig(rollout_steps=4, minibatches=2, epochs=1)
    own = {"policy": MLP(hidden_sizes=(4,)), "ppo": config, "compile": "off"}
    return PPO(env, **{**own, "total_env_steps": iterations * 4 * 8, **settings})


def with_envs(env, num_envs):
    """The same environments in another number."""
    if isinstance(env, FrameStack):
        return replace(env, env=with_envs(env.env, num_envs))
    return replace(env, num_envs=num_envs)


class FirstRow(Callback):
    """Notes the state in which a run begins, and the first row."""

    def __init__(self):
        self.state = self.row = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.state = self.state or module._learner.state_dict()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.row = self.row or outputs["row"]


@pytest.fixture
def fit(make_trainer, tmp_path):
    def fit(module, checkpoint=None):
        first, path = FirstRow(), None
        if checkpoint is not None:
            path = tmp_path / "given.ckpt"
            torch.save(checkpoint, path)
        trainer = make_trainer(callbacks=[first])
        trainer.fit(module, ckpt_path=path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return torch.load(tmp_path / "saved.ckpt", weights_only=True), first

    return fit


def dealt(checkpoint, env, ranks):
    """The checkpoint as a run of that many ranks would have saved it before its first iteration."""
    total = sum(
        len(s["acting"]["discounted_return"]) for s in checkpoint[STATE_KEY]["ranks"].values()
    )
    spec = with_envs(env, total // ranks)
    settings = PPOSettings(env=spec, redeal=True)
    refuse_deal(checkpoint, settings, world_size=ranks)
    states = {
        rank: deal_rank(checkpoint, settings, rank=rank, world_size=ranks, device=CPU)
        for rank in range(ranks)
    }
    changed = copy.deepcopy(checkpoint)
    changed[STATE_KEY] |= {"ranks": states, "world_size": ranks}
    return changed


def rows(checkpoint, part, name):
    """A tensor of all ranks, joined."""
    states = [
        checkpoint[STATE_KEY]["ranks"][rank] for rank in sorted(checkpoint[STATE_KEY]["ranks"])
    ]
    return torch.cat([state[part][name] for state in states])


@pytest.mark.parametrize(
    ("env", "policy"),
    [
        (CartPole(num_envs=8), MLP(hidden_sizes=(4,))),
        (Acrobot(num_envs=8), Recurrent(memory_size=4)),
        (FrameStack(env=CartPole(num_envs=8), frames=2), MLP(hidden_sizes=(4,))),
    ],
    ids=["CartPole", "with a memory", "FrameStack"],
)
def test_no_environment_is_lost_and_a_run_goes_on(fit, env, policy):
    saved, _ = fit(ppo(env, policy=policy))
    four, again = dealt(saved, env, 4), None
    parts = {
        name: [n for n, v in saved[STATE_KEY]["ranks"][0][name].items() if v is not None]
        for name in ("acting", "env")
    }
    for part, names in parts.items():
        for name in names:
            if not name.endswith("generator"):
                assert torch.equal(rows(four, part, name), rows(saved, part, name)), name
    # Four ranks become one, whose episodes go on.
    again, first = fit(ppo(env, policy=policy, redeal=True, iterations=5), four)
    begun = first.state
    assert torch.equal(begun["acting"]["obs"], rows(saved, "acting", "obs"))
    assert again[STATE_KEY]["iteration"] == 5
    assert again[STATE_KEY]["env_steps"] == 5 * 4 * 8
    assert first.row["iteration"] == 4
    assert first.row["resumed_on_ranks"] == 1
    assert "resumed_with_new_episodes" not in first.row


def test_streams_are_new_and_other_ones_on_each_rank(fit):
    env = CartPole(num_envs=8)
    saved, _ = fit(ppo(env))
    found = [saved, dealt(saved, env, 2), dealt(saved, env, 4)]
    states = [state for each in found for state in each[STATE_KEY]["ranks"].values()]
    streams = [s.numpy().tobytes() for each in states for s in each["generators"]]
    streams += [each["env"]["generator"].numpy().tobytes() for each in states]
    assert len(set(streams)) == len(streams) == 3 * (1 + 2 + 4)


def test_streams_of_two_deals_differ_and_each_rank_has_the_global_state_of_a_former_one(fit):
    env = CartPole(num_envs=8)
    saved, _ = fit(ppo(env))
    later = copy.deepcopy(saved)
    later[STATE_KEY]["iteration"] += 1
    four = dealt(saved, env, 4)
    for rank, state in four[STATE_KEY]["ranks"].items():
        state["global_random"] = rank
        other = dealt(later, env, 4)[STATE_KEY]["ranks"][rank]
        assert not torch.equal(state["generators"][0], other["generators"][0])
    for ranks, former in ((2, [0, 1]), (8, [0, 1, 2, 3, 3, 3, 3, 3])):
        states = dealt(four, env, ranks)[STATE_KEY]["ranks"]
        assert [states[rank]["global_random"] for rank in range(ranks)] == former


def test_with_the_same_number_of_ranks_a_run_goes_on_bit_for_bit(fit):
    saved, _ = fit(ppo(CartPole(num_envs=8)))
    plain, _ = fit(ppo(CartPole(num_envs=8), iterations=5), saved)
    given, other = fit(ppo(CartPole(num_envs=8), iterations=5, redeal=True), saved)
    assert "resumed_on_ranks" not in other.row
    for name, value in plain["state_dict"].items():
        assert torch.equal(value, given["state_dict"][name]), name


def test_what_cannot_be_dealt_is_refused_in_one_line(fit):
    env = CartPole(num_envs=8)
    saved, _ = fit(ppo(env))
    two = dealt(saved, env, 2)
    given = copy.deepcopy(two)
    with pytest.raises(ValueError, match=r"2 \(or set PPO\.redeal\), got 1"):
        fit(ppo(with_envs(env, 8)), given)
    with pytest.raises(ValueError, match=r"PPO\.env\.num_envs \* ranks must be 8, got 4\. Every"):
        fit(ppo(with_envs(env, 4), redeal=True), given)
    del given[STATE_KEY]["ranks"][1]
    with pytest.raises(ValueError, match=r"of all 2 ranks to be dealt anew, got 'those of ranks"):
        fit(ppo(env, redeal=True), given)
    given = copy.deepcopy(two)
    given[STATE_KEY]["ranks"][1]["env"]["clock"] = torch.zeros(())
    with pytest.raises(ValueError, match="Of rank 1, clock in the state of CartPole has none"):
        fit(ppo(env, redeal=True), given)


def test_environments_without_rows_are_refused(fit):
    env = CartPole(num_envs=8)
    saved, _ = fit(ppo(env))
    settings = PPOSettings(env=Morphogenesis(num_envs=4), redeal=True)
    message = r"PPO.redeal must be false, got True. The state of Morphogenesis cannot be split"
    with pytest.raises(ValueError, match=message):
        refuse_deal(saved, settings, world_size=2)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_become_one_and_then_two_again(tmp_path):
    settings = {"every": 1, "evaluates": False, "redeal": True, "resumes": True}
    for devices, num_envs, iterations in ((2, 4, 2), (1, 8, 4), (2, 4, 6)):
        size = {"devices": devices, "num_envs": num_envs}
        status, said = run(tmp_path, budget=iterations * 16 * 8, **size, **settings)
        assert status == 0, said
    mine, others = history(tmp_path), history(tmp_path, rank=1)
    assert [row["iteration"] for row in mine] == [1, 2, 3, 4, 5, 6]
    assert [row["env_steps"] for row in mine] == [128 * n for n in range(1, 7)]
    assert {row["iteration"]: row.get("resumed_on_ranks") for row in mine} == {
        **dict.fromkeys((1, 2, 4, 6)),
        3: 1,
        5: 2,
    }
    digests = {row["iteration"]: row["digest"] for row in mine}
    assert [digests[row["iteration"]] for row in others] == [row["digest"] for row in others]
    assert [row["iteration"] for row in others][-2:] == [5, 6]
