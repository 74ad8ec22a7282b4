"""HTML elements, in which every text is escaped, and the page that holds them.

Texts come from runs: names of metrics, settings, errors of a user's code. Only this file makes
markup of texts.
"""

import html
from collections.abc import Sequence
from pathlib import Path

from esper_lightning.forensics.reading import printable

__all__ = ["PAGE_BEGINS", "Markup", "element", "page", "table"]

_MARK = "<!doctype html>\n<!-- written by esper -->"
PAGE_BEGINS = _MARK.encode()
"""Regular expression for the first bytes of a page: a file that begins so may be replaced."""
_FOLDER = Path(__file__).parent
_WITHOUT_END = ("br", "meta", "source")  # of HTML; elements of SVG have an end


class Markup(str):
    """Text that is markup already, and not escaped again."""

    __slots__ = ()


def element(name: str, /, *content: str, **attributes: object) -> Markup:
    """An element with its content.

    Args:
        name: Name of the element.
        content: Elements, and texts that are escaped.
        attributes: Attributes; ``_`` in a name stands for ``-``, and one at the end is dropped
            (``class_``). ``None`` omits the attribute.
    """
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    opened = f"<{name}{''.join(pairs)}>"
    if name in _WITHOUT_END:
        return Markup(opened)
    return Markup(f"{opened}{''.join(map(_escaped, content))}</{name}>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table that scrolls by itself where the page is narrow."""
    lines = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    heads = element("thead", element("tr", *(element("th", cell) for cell in head)))
    content = [heads] if any(head) else []
    return element("div", element("table", *content, element("tbody", *lines)), class_="wide")


def page(title: str, *sections: Markup, refresh_s: int | None = None) -> str:
    """A whole page, with styles and script within it.

    Args:
        title: Title of the page, shown above the sections, too.
        sections: Content of the page.
        refresh_s: Seconds after which a browser loads the file again; ``None`` for never.
    """
    style = Markup((_FOLDER / "page.css").read_text("utf-8"))
    script = Markup((_FOLDER / "page.js").read_text("utf-8"))
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="refresh", content=refresh_s) if refresh_s else Markup(),
        element("title", title),
        Markup(f"<style>{style}</style>"),
    ]
    body = element("main", element("h1", title), *sections)
    script = Markup(f"<script>{script}</script>")
    whole = element("html", element("head", *head), element("body", body, script), lang="en")
    return f"{_MARK}\n{whole}\n"


def _escaped(text: str) -> str:
    if isinstance(text, Markup):
        return text
    return html.escape("\n".join(map(printable, text.split("\n"))))
