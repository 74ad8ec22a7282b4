"""Private attributes of Lightning are used in one file only, and they exist."""

import ast
from pathlib import Path

import lightning
import pytest
from lightning.pytorch.profilers import PyTorchProfiler

import esper_lightning
from esper_lightning.callbacks import lightning_internals as internals

PACKAGE = Path(esper_lightning.__path__[0])
LIGHTNING = Path(lightning.__path__[0])
FILE = PACKAGE / "callbacks" / "lightning_internals.py"


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names():
    """Names that Lightning defines or sets, and may rename in any release."""
    names = set()
    for folder in ("pytorch", "fabric"):
        for path in (LIGHTNING / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
    return set(filter(is_private, names))


def touched(source, names):
    """Private names of Lightning that a source reads of any object but its own ``self``.

    Also by name, as in ``getattr(logger, "_version")``. A class that derives from one of
    Lightning's has what it inherits.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
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
        if path != FILE
        for line, what in touched(path.read_text(), names)
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "trainer._run_stage()",
        "self.trainer._results",
        'getattr(logger, "_version")',
        "from lightning.pytorch.utilities.exceptions import _TunerExitException",
        "call._interrupt(trainer, error)",
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


def test_a_profiler_gives_its_settings():
    profiler = PyTorchProfiler(record_shapes=True)
    assert internals.profiler_settings(profiler)["record_shapes"] is True
    assert not internals.records_nvtx(profiler)
    assert internals.take_open_spans(profiler) == []
    assert internals.take_parent_profiler(profiler) is None
