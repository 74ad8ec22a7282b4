"""A table under a title, as plain text for a terminal or as Markdown for a file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from esper_lightning.forensics.reading import printable

__all__ = ["Section", "number"]

# Columns that are aligned to the left; numbers are aligned to the right.
_TEXT_COLUMNS = ("variant", "policy", "run", "how it ended")


@dataclass(frozen=True)
class Section:
    """A title, a table and remarks."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    remarks: Sequence[str] = field(default_factory=list[str])

    def plain(self) -> list[str]:
        """Lines of plain text: the columns of the table, and the remarks below."""
        table = [[*map(printable, row)] for row in (self.head, *self.rows)] if self.rows else []
        columns = range(len(self.head))
        widths = [max((len(row[k]) for row in table), default=0) for k in columns]
        is_text = [name in _TEXT_COLUMNS for name in self.head]
        lines = [
            "  ".join(
                row[k].ljust(widths[k]) if is_text[k] else row[k].rjust(widths[k]) for k in columns
            ).rstrip()
            for row in table
        ]
        return [*map(printable, (self.title, *(f"  {line}" for line in (*lines, *self.remarks))))]

    def markdown(self) -> list[str]:
        """Lines of Markdown: a heading, a table, and a list of remarks."""
        rules = [" --- " if name in _TEXT_COLUMNS else " ---: " for name in self.head]
        cells = ([cell.replace("|", "\\|") for cell in row] for row in self.rows)
        rows = [f"| {' | '.join(row)} |" for row in cells]
        table = [f"| {' | '.join(self.head)} |", f"|{'|'.join(rules)}|", *rows, ""]
        remarks = [f"- {remark}" for remark in self.remarks]
        lines = [f"## {self.title}", "", *(table if rows else []), *remarks, *[""] * bool(remarks)]
        return [*map(printable, lines)]


def number(value: float | None) -> str:
    """A number with four digits, from 1,000 on as an integer; a dash for ``None``."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"
