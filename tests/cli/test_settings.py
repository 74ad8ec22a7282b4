"""A mistake in the settings names the setting, the rule and the value."""

from typing import Literal

import pytest

from esper_lightning.cli.settings import SettingsError, SettingsParser
from esper_lightning.envs import EnvSpec


@pytest.fixture
def parser():
    parser = SettingsParser(exit_on_error=False)
    parser.add_argument("--group.number", type=int, default=1)
    parser.add_argument("--group.kind", type=Literal["a", "b"], default="a")
    parser.add_argument("--env", type=EnvSpec | None, default=None)
    parser.add_argument("--config", action="config")
    return parser


def mistake(parser, *words):
    with pytest.raises(SettingsError) as caught:
        parser.parse_args([*words])
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--group.number=x", "group.number must be an integer, got 'x'"),
        ("--group.kind=c", "group.kind must be one of a, b, got 'c'"),
        ("--env=CartPol", "The nearest is 'CartPole'."),
        ("--group.number.x=3", "group.number must be an integer, and has no setting 'x'."),
        ("--group.kind.x.y=a", "group.kind must be one of a, b, and has no setting 'x.y'."),
        ("--group.numbr=3", "group.numbr is no setting. The nearest is 'group.number'."),
    ],
)
def test_a_wrong_argument_is_explained(parser, word, says):
    assert says in mistake(parser, word)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("group: {number: x}", "group.number must be an integer, got 'x'"),
        ("group: {number: 1}\ngroup: {number: 2}", "config.yaml:2:1: the key 'group' stands"),
        ("grup: 1", "'grup' is no setting. The nearest is 'group'."),
        ("group: [", "config.yaml"),
    ],
)
def test_a_mistake_in_a_file_is_explained(parser, tmp_path, text, says):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert says in mistake(parser, f"--config={path}")


def test_settings_without_a_mistake_are_read(parser, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("group: {number: 3}\nenv: {class_path: CartPole, init_args: {num_envs: 2}}")
    found = parser.parse_args([f"--config={path}", "--group.kind=b"])
    assert (found.group.number, found.group.kind) == (3, "b")
    assert found.env.init_args.num_envs == 2
