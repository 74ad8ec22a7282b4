"""Sections are printed as plain text and as Markdown."""

import math

import pytest

from esper_lightning.comparison.section import Section, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (12.3456, "12.35"),
        (999.94, "999.9"),
        (1000.0, "1,000"),
        (-1000.0, "-1,000"),
        (-1234567.8, "-1,234,568"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_have_four_digits_and_thousands_are_whole(value, text):
    assert number(value) == text


TABLE = Section("Title", ["variant", "mean"], [["a", "1"], ["long name", "1,000"]], ["Remark."])


def test_text_is_aligned_to_the_left_and_numbers_to_the_right():
    assert TABLE.plain() == [
        "Title",
        "  variant     mean",
        "  a              1",
        "  long name  1,000",
        "  Remark.",
    ]
    assert TABLE.markdown() == [
        "## Title",
        "",
        "| variant | mean |",
        "| --- | ---: |",
        "| a | 1 |",
        "| long name | 1,000 |",
        "",
        "- Remark.",
        "",
    ]


def test_a_section_without_rows_has_no_table():
    empty = Section("Title", ["variant", "mean"], remarks=["Remark."])
    assert empty.plain() == ["Title", "  Remark."]
    assert empty.markdown() == ["## Title", "", "- Remark.", ""]


def test_a_bar_within_a_cell_does_not_end_it():
    assert "| a \\| b |" in Section("Title", ["run"], [["a | b"]]).markdown()
