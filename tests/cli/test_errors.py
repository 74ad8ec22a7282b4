"""A mistake is one short line, and exit status 2."""

from pathlib import Path

import pytest

from esper_lightning.cli.errors import (
    LONGEST_LINE,
    CommandParser,
    fail,
    local_path,
    nearest,
    one_line,
)


def test_a_line_stays_as_it_is_where_it_fits_and_loses_the_middle_of_long_words():
    assert one_line("a line") == "a line"
    assert one_line("two\nlines\tof  text") == "two lines of text"
    long = one_line(f"PPO.env must be short, got {'x' * 500}.")
    assert len(long) <= LONGEST_LINE
    assert long.startswith("PPO.env must be short, got xxx")
    assert long.endswith("xxx.")
    assert len(one_line("word " * 500)) == LONGEST_LINE
    hint = one_line(f"PPO.env must be short, got {'word ' * 500}. Take another.")
    assert len(hint) == LONGEST_LINE
    assert hint.endswith("... Take another.")


def test_what_cannot_be_printed_is_escaped():
    assert one_line("a\x1b[31m\udce9").isprintable()


def test_the_nearest_word_is_suggested_and_none_that_is_far():
    assert nearest("cartpol", ["cartpole", "pendulum"]) == " The nearest is 'cartpole'."
    assert nearest("zzz", ["cartpole"]) == ""


def test_a_mistake_ends_the_command(capsys):
    with pytest.raises(SystemExit) as caught:
        fail("--x must be y")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "esper: error: --x must be y\n"


def test_a_parser_names_the_nearest_option(capsys):
    parser = CommandParser("esper x", "Does x.")
    parser.add_argument("--output")
    with pytest.raises(SystemExit):
        parser.parse_args(["--outptu=3"])
    assert "The nearest is '--output'." in capsys.readouterr().err


def test_a_folder_must_be_on_this_machine():
    assert local_path("a/b") == Path("a/b")
    for elsewhere in ("", "s3://a"):
        with pytest.raises(Exception, match="on this machine"):
            local_path(elsewhere)
