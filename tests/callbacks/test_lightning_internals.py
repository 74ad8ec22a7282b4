"""Private attributes of Lightning and TensorBoard are used in one file each, and they exist."""

import ast
import copy
import importlib
import inspect
import pickle
import re
import textwrap
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tensorboard.summary.writer import event_file_writer, record_writer

import esper_lightning
from esper_lightning import MLP, PPO
from esper_lightning.callbacks import lightning_internals as internals
from esper_lightning.envs import CartPole
from tests.training.short_runs import SMALL, fit

PACKAGE = Path(esper_lightning.__path__[0])
LIGHTNING = Path(lightning.__path__[0])
FILE = PACKAGE / "callbacks" / "lightning_internals.py"
OTHERS = (
    *("checkpoint_internals.py", "loop_internals.py", "profiler_internals.py"),
    *("tensorboard_internals.py", "tracker_internals.py"),
)
FILES = (FILE, *map(FILE.with_name, OTHERS))


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names():
    """Names that Lightning or TensorBoard's writer of events defines or sets, and may rename."""
    names = set()
    files = [path for each in ("pytorch", "fabric") for path in (LIGHTNING / each).rglob("*.py")]
    for path in [*files, Path(event_file_writer.__file__), Path(record_writer.__file__)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return set(filter(is_private, names)) - vars(torch.nn.Module()).keys()  # those are torch's


def touched(source, names):
    """Private names of Lightning that a source reads of any object but its own ``self``.

    Also by name, as in ``getattr(logger, "_version")``. A class that derives from one of
    Lightning's has what it inherits.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            if ast.unparse(node.value) not in ("self", "cls", "super()", "tensor"):  # torch's
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in names:
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            yield from ((node.lineno, each.name) for each in node.names if is_private(each.name))


@pytest.fixture(scope="module")
def names():
    return private_names()


def test_no_other_file_of_the_package_touches_any(names):
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in FILES
        for line, what in touched(path.read_text(), names)
    ]
    assert found == []


def used_by_itself(kind):
    """Private names that a class defines, or reads of its ``self``."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()"):
            yield node.attr
        elif isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for each in targets if isinstance(each, ast.Name))


def inherited(kind):
    """Private names of Lightning that a class uses because it inherits them."""
    bases = [base for base in kind.__mro__ if base.__module__.startswith("lightning.")]
    theirs = {name for base in bases for name in used_by_itself(base)}
    return set(filter(is_private, theirs & set(used_by_itself(kind)))) if bases else set()


def test_what_classes_use_of_what_they_inherit_is_listed_in_that_file():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if "lightning.pytorch" not in path.read_text() or path == FILE:
            continue
        module = importlib.import_module(
            ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        )
        kinds = [each for each in vars(module).values() if isinstance(each, type)]
        own = [kind for kind in kinds if kind.__module__ == module.__name__]
        found |= {kind.__name__: inherited(kind) for kind in own}
    lines = re.findall(r"^\* ``(\w+)``(.*)[;.]$", internals.__doc__, re.M)
    listed = {name: set(re.findall(r"``(_\w+)``", rest)) for name, rest in lines}
    assert {name: names for name, names in found.items() if names} == listed


@pytest.mark.parametrize(
    "source",
    [
        "trainer._run_stage()",
        "self.trainer._results",
        'getattr(logger, "_version")',
        "from lightning.pytorch.utilities.exceptions import _TunerExitException",
        "call._interrupt(trainer, error)",
        "records._writer = file",
        "writer._async_writer",
    ],
)
def test_one_that_is_touched_is_found(names, source):
    assert list(touched(source, names))


def test_those_that_the_recorder_replaces_are_there(make_trainer):
    trainer = make_trainer()
    assert callable(getattr(*internals.INTERRUPT))
    for name in (internals.RUN_STAGE, internals.TEARDOWN):
        assert callable(getattr(trainer, name))
    assert internals.handlers_to_restore(trainer) == {}
    assert internals.run_depth(trainer) == 0
    assert not internals.spawns_processes(trainer)
    internals.note_sigterm(trainer)
    assert trainer.received_sigterm


HOOKS = (
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"),
    *("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start"),
    *("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"),
    *("on_train_epoch_end", "on_train_end"),
)
STEPS = ("training_step", "validation_step", "on_validation_model_zero_grad")


def stops(*_):
    next(iter(()))


class TestCodeThatRaisesStopIteration:
    """Lightning takes it for the end of the data, and would begin the next epoch for ever."""

    @pytest.mark.parametrize("hook", HOOKS)
    def test_in_a_callback_it_is_an_error(self, hook):
        callback = type("Mine", (Callback,), {hook: stops})()
        with pytest.raises((RuntimeError, StopIteration)) as caught:
            fit(CartPole(num_envs=4), callback, eval_episodes=4)
        assert isinstance(caught.value.__cause__ or caught.value, StopIteration)

    @pytest.mark.parametrize("hook", [*HOOKS, *STEPS])
    def test_in_a_module_it_is_an_error(self, hook, make_trainer):
        kind = type("Mine", (type("Mixin", (), {hook: stops}), PPO), {})
        model = kind(
            CartPole(num_envs=4),
            MLP(hidden_sizes=(4,)),
            SMALL,
            eval_episodes=4,
            iterations_per_epoch=2,
        )
        trainer = make_trainer(max_steps=4, limit_val_batches=1.0)
        with pytest.raises((RuntimeError, StopIteration)) as caught:
            trainer.fit(model)
        assert isinstance(caught.value.__cause__ or caught.value, StopIteration)

    def test_the_function_that_raised_it_is_named(self):
        callback = type("Mine", (Callback,), {"on_train_batch_end": stops})()
        with pytest.raises(RuntimeError, match=r"^stops raised StopIteration, which Lightning"):
            fit(CartPole(num_envs=4), callback, evaluates=False)

    def test_in_an_evaluation_alone_it_is_an_error(self, make_trainer):
        kind = type("Mine", (PPO,), {"validation_step": stops})
        model = kind(CartPole(num_envs=4), MLP(hidden_sizes=(4,)), SMALL)
        with pytest.raises(RuntimeError, match="stops raised StopIteration"):
            make_trainer(limit_val_batches=1.0).validate(model)

    def test_in_a_prediction_it_is_an_error(self, make_trainer):
        members = {"predict_step": stops, "predict_dataloader": lambda self: [0, 1]}
        model = type("Mine", (PPO,), members)(CartPole(num_envs=4), MLP(hidden_sizes=(4,)), SMALL)
        with pytest.raises(RuntimeError, match="stops raised StopIteration"):
            make_trainer().predict(model)

    @pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_end"])
    def test_in_data_of_a_users_own_it_is_an_error(self, hook):
        """Which are Lightning's loaders, too."""
        demonstrations = iter(CombinedLoader([[1]], "min_size"))
        callback = type("Mine", (Callback,), {hook: lambda *_: next(demonstrations)})()
        with pytest.raises(
            RuntimeError, match=r"(<lambda>|Imitates.training_step) raised StopIteration"
        ):
            fit(CartPole(num_envs=4), callback, iterations=6, evaluates=False)

    def test_in_data_of_a_step_it_is_an_error(self, make_trainer):
        class Imitates(PPO):
            def training_step(self, batch, batch_idx):
                next(demonstrations)
                return super().training_step(batch, batch_idx)

        demonstrations = iter(CombinedLoader([[1]], "min_size"))
        model = Imitates(CartPole(num_envs=4), MLP(hidden_sizes=(4,)), SMALL)
        with pytest.raises(
            RuntimeError, match=r"(<lambda>|Imitates.training_step) raised StopIteration"
        ):
            make_trainer(max_steps=4).fit(model)

    def test_data_may_end(self, make_trainer):
        class Short:
            def __len__(self):
                return 5

            def __iter__(self):
                return iter((0, 1))

        kind = type("Mine", (PPO,), {"train_dataloader": lambda self: Short()})
        model = kind(CartPole(num_envs=4), MLP(hidden_sizes=(4,)), SMALL)
        trainer = make_trainer(max_steps=4)
        trainer.fit(model)
        assert (model.iteration, trainer.current_epoch) == (4, 2)

    def test_modules_of_others_are_left_alone(self, make_trainer):
        callback = type("Mine", (Callback,), {"on_train_epoch_end": stops})()
        trainer = make_trainer(max_epochs=2, callbacks=[callback])
        trainer.fit(BoringModel())  # Lightning ends the run there
        assert trainer.state.finished

    def test_a_trainer_can_be_copied_after_a_run(self):
        _, trainer = fit(CartPole(num_envs=4), evaluates=False)
        copied = copy.deepcopy(trainer)
        assert copied.fit_loop.advance.__self__ is copied.fit_loop
        assert pickle.loads(pickle.dumps(trainer)).global_step == 4

    def test_a_module_may_skip_the_rest_of_an_epoch(self, make_trainer):
        class Skips(PPO):
            skipped = 0

            def on_train_batch_start(self, batch, batch_idx):
                self.skipped += self.current_epoch == 1
                return -1 if self.current_epoch == 1 else None

        model = Skips(CartPole(num_envs=4), MLP(hidden_sizes=(4,)), SMALL, iterations_per_epoch=2)
        trainer = make_trainer(max_steps=4)
        trainer.fit(model)
        assert (model.iteration, model.skipped, trainer.current_epoch) == (4, 1, 3)


def test_lines_without_content_are_left_out_and_others_are_not(capfd):
    with internals.calm(), internals.calm():
        Trainer(accelerator="cpu", devices=1, fast_dev_run=2)
        rank_zero_info("Tip: buy something")
    said = capfd.readouterr().err
    assert "Running in `fast_dev_run` mode" in said
    assert "GPU available: False" not in said
    assert "TPU available: False" not in said
    assert "Tip" not in said
    rank_zero_info("Tip: once more")
    assert "Tip: once more" in capfd.readouterr().err
