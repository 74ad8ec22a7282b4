"""The state of each rank that is resumed, and ranks that would start from different states."""

import types

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from esper_lightning.core.ranks import FirstMessage, Ranks, RanksDisagreeError
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.resumption import (
    Resumption,
    rank_states,
    refuse_other_ranks,
    refuse_other_weights_of_ranks,
)
from tests.training.checkpoint.test_choice import checkpoint, model


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_resumes_its_own_environments(rank):
    resumed = model()
    state = types.SimpleNamespace(fn=TrainerFn.FITTING)
    strategy = types.SimpleNamespace(root_device=torch.device("cpu"))
    resumed._trainer = types.SimpleNamespace(
        state=state, world_size=2, global_rank=rank, callbacks=[], strategy=strategy
    )
    saved = checkpoint(model(), world_size=2)
    saved[STATE_KEY] |= {"iteration": 3, "env_steps": 7, "gradient_steps": 5, "train_time_s": 1.0}
    saved[STATE_KEY] |= {"recent_episodes": [], "ranks": {0: "the first's", 1: "the second's"}}
    resumed.refuse_checkpoint = lambda *_, **__: None  # it is not whole
    resumed.on_load_checkpoint(saved)
    assert resumed._resumption.rank_state == saved[STATE_KEY]["ranks"][rank]


class Other(Ranks):
    """Two ranks, of which the second has what ``other`` makes of the objects of this rank."""

    def __init__(self, other):
        super().__init__(2)
        self._other = other

    def gather_objects(self, mine):
        return [mine, self._other(mine)]


class Learner:
    """Notes with which state it starts."""

    def state_dict(self):
        return {"env": 3}

    def start(self, optimizer, state):
        self.state = state
        return state is not None


def test_a_rank_without_a_state_starts_new_episodes_and_another_resumes_its_own():
    learner = Learner()
    assert not Resumption(None).start(learner, None)
    saved = rank_states(learner, Ranks(1), rank=1, alone=True)
    assert list(saved) == [1]
    expected = torch.rand(3)
    torch.manual_seed(99)
    torch.rand(7)
    state = rank_states(learner, Ranks(1), rank=0, alone=True)[0]
    expected = torch.rand(3)
    torch.rand(5)
    assert Resumption(state).start(learner, None)
    assert learner.state["env"] == 3
    assert torch.equal(torch.rand(3), expected)  # the global stream is resumed, too


def test_within_an_iteration_no_rank_has_a_state():
    assert rank_states(None, Ranks(1), rank=0, alone=False) == {}


def start(ranks, of=None, **settings):
    module = of or model()
    arguments = {"iteration": 0, "resumes_from": None, "load": None}
    arguments |= {"share": lambda ranks, path: path, **settings}
    refuse_other_ranks(ranks, module.settings, module, **arguments)


def test_ranks_that_start_alike_are_accepted_and_others_are_refused_by_what_differs():
    def elsewhere(mine):
        other = {**mine.settings, "seed": 5} if isinstance(mine, FirstMessage) else None
        return mine if other is None else mine._replace(settings=other)

    def refused(mine):
        return mine._replace(problem="ValueError: no") if isinstance(mine, FirstMessage) else mine

    def later(mine):
        return mine if isinstance(mine, FirstMessage) else mine._replace(iteration=4)

    def lost(mine):
        return mine if isinstance(mine, FirstMessage) else mine._replace(problem="OSError: no file")

    start(Other(lambda mine: mine))
    with pytest.raises(RanksDisagreeError, match=r"^PPO.seed must be the same .*, got \[0, 5\]"):
        start(Other(elsewhere))
    with pytest.raises(RanksDisagreeError, match="able to start; rank 1: ValueError: no"):
        start(Other(refused))
    with pytest.raises(RanksDisagreeError, match=r"^ckpt_path must be the same .*, got \[0, 4\]"):
        start(Other(later))
    with pytest.raises(RanksDisagreeError, match="able to start; rank 1: OSError: no file"):
        start(Other(lost))


def test_weights_that_differ_in_one_bit_end_the_run():
    module = model()
    refuse_other_weights_of_ranks(Other(lambda mine: mine), module, iteration=3)
    with pytest.raises(RuntimeError, match=r"of all ranks must be the same, got .* in iteration 3"):
        refuse_other_weights_of_ranks(Other(lambda mine: mine ^ 1), module, iteration=3)
