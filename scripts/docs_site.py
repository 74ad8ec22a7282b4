"""What the docs site has from beside ``docs/``: hooks that ``mkdocs.yml`` names.

Pages of the repository's root and of ``benchmarks/results`` become pages of the site, links to them
are changed accordingly, and the navigation lists all decisions and all results.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Where a file of the repository is in the site.
PLACES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    **{
        f"benchmarks/results/{path.name}": f"results/{path.name}"
        for path in sorted((ROOT / "benchmarks/results").iterdir())
        if path.suffix in (".md", ".png")
    },
}
SOURCES = {place: source for source, place in PLACES.items()}


def on_config(config: Any) -> Any:
    """Fill the navigation with every decision and every file of results."""
    decisions = [
        f"decisions/{path.name}" for path in sorted((ROOT / "docs/decisions").glob("*.md"))
    ]
    results = [place for place in SOURCES if place.startswith("results/") and place.endswith(".md")]
    sections = {name: pages for section in config.nav for name, pages in section.items()}
    for page in sections["Architecture"]:
        if "Decisions" in page:
            page["Decisions"] = decisions
    sections["Results"].append({"Files": results})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and figures from beside ``docs/``."""
    for source, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links of the repository to links of the site."""
    place = page.file.src_uri
    here = posixpath.dirname(SOURCES.get(place, f"docs/{place}"))

    def changed(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        if re.match(r"[a-z]+:", link):
            return match[0]
        target = posixpath.normpath(posixpath.join(here, link))
        if target in PLACES:
            target = PLACES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return match[0]
        return f"]({posixpath.relpath(target, posixpath.dirname(place) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)]*)?\)", changed, markdown)
