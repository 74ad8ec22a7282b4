"""A checkpoint of which any one entry is wrong is refused in a line, or is resumed."""

import copy
import random
import re
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from esper_lightning import PPO, PPOConfig
from esper_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from esper_lightning.core.seeding import why_not_restorable
from esper_lightning.envs import CartPole
from esper_lightning.training.checkpoint.content import STATE_KEY

PLACES = ("loops", "callbacks", STATE_KEY, "optimizer_states", "")
FIT = ("loops", "fit_loop")
MANUAL = (*FIT, "epoch_loop.manual_optimization.optim_step_progress")
BEST = (
    "BestCheckpoint{'monitor': 'eval/episode_return_mean', 'mode': 'max', "
    "'every_n_train_steps': 0, 'every_n_epochs': 1, 'train_time_interval': None}"
)
RANK = (STATE_KEY, "ranks", 0)
NAN = float("nan")
WRONG = (
    *(None, True, False, -1, 0, 10**29, 10**400, 0.5, NAN, float("inf"), "text", b"bytes"),
    *([], {}, (), [None], [[1]], {"a": 1}, {1: 2}, torch.ones(1), torch.ones(2, 3).to_sparse()),
)


def prepare(folder, steps: int = 3):
    ppo = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
    model = PPO(CartPole(num_envs=2), ppo=ppo, iterations_per_epoch=1, eval_episodes=2)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        default_root_dir=folder,
        callbacks=[LastCheckpoint(), BestCheckpoint("eval/episode_return_mean")],
    )
    return trainer, model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer, model = prepare(folder, 2)
    trainer.fit(model)
    trainer.save_checkpoint(folder / "whole.ckpt")
    return torch.load(folder / "whole.ckpt", weights_only=True)


@pytest.fixture
def whole(saved):
    return copy.deepcopy(saved)


@pytest.fixture
def trainer_and_model(tmp_path):
    return partial(prepare, tmp_path)


def places_of(tree, path=()):
    """Paths of all entries of a checkpoint."""
    pairs = ()
    if isinstance(tree, dict):
        pairs = tree.items()
    elif isinstance(tree, list):
        pairs = enumerate(tree)
    for key, value in pairs:
        yield (*path, key)
        if not isinstance(value, Tensor):
            yield from places_of(value, (*path, key))


def put(checkpoint, path, value):
    *places, last = path
    for place in places:
        checkpoint = checkpoint[place]
    checkpoint[last] = value


def damage(chance: random.Random, checkpoint) -> str:
    """Replace or remove one entry, and say which."""
    place = chance.choice(PLACES)
    known = [path for path in places_of(checkpoint) if place in ("", path[0])]
    *places, last = path = chance.choice(known)
    holder = checkpoint
    for each in places:
        holder = holder[each]
    if chance.random() < 0.15:
        del holder[last]
        return f"{path} removed"
    holder[last] = value = chance.choice(WRONG)
    return f"{path} = {str(value)[:40]!r}"


def is_refused(checkpoint, trainer, model) -> bool:
    own = trainer.callbacks
    try:
        model.refuse_checkpoint(checkpoint, "x.ckpt", world_size=1, callbacks=own)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either may be
        return True
    return False


@contextmanager
def environments_may_refuse():
    """Accept the one line in which an environment refuses a state."""
    try:
        yield
    except ValueError as error:
        if not re.fullmatch(r"\w+\.load_state_dict\(\).* must .*", str(error)):
            raise


def damage_and_resume(whole, path, make, seeds: range) -> set[bool]:
    """Whether damaged checkpoints are refused before a run begins; others must be resumed.

    An environment knows its own state alone: it refuses another in a line as the run starts.
    """
    said: set[bool] = set()
    trainer, model = make()
    for seed in seeds:
        checkpoint = copy.deepcopy(whole)
        what = damage(random.Random(seed), checkpoint)
        try:
            refused = is_refused(checkpoint, trainer, model)
            if not refused:
                torch.save(checkpoint, path)
                with environments_may_refuse():
                    trainer.fit(model, ckpt_path=path)
                trainer, model = make()
        except BaseException as error:
            error.add_note(f"Seed {seed}: {what}")
            raise
        said.add(refused)
    return said


def test_one_wrong_entry_is_refused_or_does_no_harm(whole, trainer_and_model, tmp_path):
    seeds = range(16)
    said = damage_and_resume(whole, tmp_path / "x.ckpt", trainer_and_model, seeds)
    assert said == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 250))
def test_a_thousand_wrong_entries(whole, trainer_and_model, tmp_path, first):
    seeds = range(first, first + 250)
    damage_and_resume(whole, tmp_path / "x.ckpt", trainer_and_model, seeds)


FOUND = [  # path, value, and the name of the entry in the error
    ((*MANUAL, "total", "completed"), None, "optim_step_progress.total.completed is no count"),
    ((*MANUAL, "total", "completed"), 10**400, "optim_step_progress.total.completed is no count"),
    ((*FIT, "epoch_loop.batch_progress", "total"), True, "batch_progress.total is no dictionary"),
    ((*FIT, "epoch_loop.state_dict"), 10**29, "epoch_loop.state_dict is no dictionary"),
    (("callbacks", BEST), NAN, "is a float"),
    (("callbacks", BEST), [], "is a list"),
    (("callbacks", BEST, "best_model_score"), "text", "BestCheckpoint.best_model_score is a str"),
    ((*RANK, "global_random", "numpy"), {}, "global_random.numpy is a dict"),
    ((*RANK, "global_random", "numpy"), [], "global_random cannot be restored: ValueError"),
    ((*RANK, "global_random", "python", 0), "x", "global_random cannot be restored: ValueError"),
    ((*RANK, "global_random", "torch"), torch.ones(1), "global_random cannot be restored: TypeE"),
    ((*RANK, "generators"), [], "generators has 0 states, not 2"),
    ((*RANK, "generators", 0), torch.ones(1), "generators cannot be restored: ValueError"),
    ((*RANK, "acting", "discounted_return"), None, "acting.discounted_return is a NoneType"),
    ((*RANK, "env"), {"state": 1}, "ranks.0.env.state is a int"),
    ((STATE_KEY, "recent_episodes"), [[10**400, 1.0, 1.0]], "0.0 is no finite number"),
    (("optimizer_states", 0, "param_groups", 0, "betas"), None, "It has {'betas': None"),
    (("optimizer_states", 0, "param_groups", 0, "fused"), torch.ones(2), "fused holds a Tensor"),
    ((*RANK, "acting", "memory"), torch.ones(2).to_sparse(), "memory is a sparse tensor"),
]


@pytest.mark.parametrize(("path", "value", "said"), FOUND, ids=[each[2] for each in FOUND])
def test_what_would_fail_within_a_run_is_refused_before(
    whole, trainer_and_model, path, value, said
):
    trainer, model = trainer_and_model()
    own = trainer.callbacks
    model.refuse_checkpoint(whole, "x.ckpt", world_size=1, callbacks=own)
    if "python" in path:
        whole[STATE_KEY]["ranks"][0]["global_random"]["python"] = list(random.getstate())
    put(whole, path, value)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        model.refuse_checkpoint(whole, "x.ckpt", world_size=1, callbacks=own)
    assert str(caught.value).startswith("ckpt_path must hold ")
    assert "\n" not in str(caught.value)


def test_a_look_at_random_states_changes_none(whole):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    states = whole[STATE_KEY]["ranks"][0]
    assert why_not_restorable(states["global_random"], states["generators"]) is None
    assert torch.equal(torch.get_rng_state(), before)
