"""Groups of settings are chosen for the help, and the parser is as it was afterwards."""

import argparse

import pytest

from esper_lightning.cli.setting_help import usage_of, with_groups


@pytest.fixture
def parser():
    made = argparse.ArgumentParser(usage=usage_of("fit"))  # has the group of --help already
    for title, names in {
        "Trainer": ("trainer", "trainer.devices"),
        "Model": ("model", "model.seed"),
        "Algorithm": ("model.ppo.clip",),
        "Data": ("data",),
        "Command": ("run_dir",),
    }.items():
        group = made.add_argument_group(title)
        for name in names:
            group.add_argument(f"--{name}")
    return made


@pytest.mark.parametrize(("lightnings", "titles"), [
    (False, ["Command", "Model", "Algorithm", "options"]),
    (True, ["Trainer", "Data"]),
])  # fmt: skip
def test_settings_of_the_command_come_first_and_lightnings_are_apart(parser, lightnings, titles):
    before = parser.format_help()
    with with_groups(parser, lightnings=lightnings):
        shown = parser.format_help()
    places = [shown.index(f"\n{title}:") for title in titles]
    assert places == sorted(places)
    assert shown.count(":\n") == len(titles)
    assert parser.format_help() == before
