"""A headless browser that opens a page of this package, if one is installed."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)

needs_browser = pytest.mark.skipif(_BROWSER is None, reason="needs chromium")


def rendered(page: Path, *options: str) -> str:
    """The document after its script has run, as the browser has it."""
    assert _BROWSER is not None
    words = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *options]
    done = subprocess.run(
        [*words, "--dump-dom", page.absolute().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


class Elements(HTMLParser):
    """Elements of a page with their attributes, and all texts outside styles and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] and self.elements[-1][0] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
