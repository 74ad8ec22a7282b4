"""Objects are found by the path under which settings and checkpoints name them."""

import collections
import os.path

import pytest

from esper_lightning.core.imports import import_object


@pytest.mark.parametrize(("path", "found"), [
    ("collections:OrderedDict", collections.OrderedDict),
    ("collections.OrderedDict", collections.OrderedDict),
    ("collections:OrderedDict.fromkeys", collections.OrderedDict.fromkeys),
    ("collections.OrderedDict.fromkeys", collections.OrderedDict.fromkeys),
    ("os.path.join", os.path.join),
])  # fmt: skip
def test_a_name_may_lead_through_modules_and_classes(path, found):
    assert import_object(path) == found


@pytest.mark.parametrize(("path", "error", "message"), [
    ("no_such_module.name", ImportError, "no_such_module"),
    ("no_such_module:name", ImportError, "no_such_module"),
    ("collections.NoSuch", AttributeError, "NoSuch"),
    ("collections.NoSuch.more", AttributeError, "NoSuch"),
    ("collections:NoSuch", AttributeError, "NoSuch"),
])  # fmt: skip
def test_what_is_not_there_is_named(path, error, message):
    with pytest.raises(error, match=message):
        import_object(path)


def test_an_import_that_fails_within_the_module_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    with pytest.raises(ImportError, match="not_installed_here"):
        import_object("needs_more:name")
