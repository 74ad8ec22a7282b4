"""``esper compare RUN ...``: a comparison of variants over the same seeds.

It needs scipy, and matplotlib for the figure, but no torch.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esper_lightning.cli.errors import CommandParser, fail, local_path
from esper_lightning.core.errors import require
from esper_lightning.core.paths import require_output, require_output_folder
from esper_lightning.forensics.files import strict_json, write_atomically
from esper_lightning.forensics.pictures import PICTURE_BEGINS

if TYPE_CHECKING:
    from esper_lightning.comparison.runs import Run, Score
    from esper_lightning.comparison.scores import Comparison

__all__ = ["compare_runs", "run"]

# Packages by the name of their module, with their name for pip.
_NEEDED = {"scipy": "scipy", "yaml": "PyYAML"}
_NEEDED_TO_DRAW = {"matplotlib": "matplotlib"}


def run(arguments: list[str]) -> None:
    """Print the comparison; exit with status 2 where the runs cannot be compared."""
    parser = CommandParser(
        "esper compare",
        "Compare runs over the seeds that all variants have.",
        epilog="Runs that differ in more than their seed are variants, named by the settings.",
    )
    parser.add_argument(
        "runs", type=local_path, nargs="+", metavar="RUN", help="or a folder of runs"
    )
    parser.add_argument("--baseline", help="name of a variant; the first if not given")
    parser.add_argument(
        "--score",
        choices=("evaluation", "rollout"),
        help="returns to compare; evaluations if not given and every run has some",
    )
    parser.add_argument("--output", metavar="DIR", help="write comparison.md, .png and .html there")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(arguments)
    _require_installed(_NEEDED | (_NEEDED_TO_DRAW if options.output is not None else {}))
    try:
        require(options.output != "", "--output", "name a directory", options.output)
        files = None if options.output is None else _files(Path(options.output))
        comparison = compare_runs(options.runs, baseline=options.baseline, score=options.score)
        if files is not None:
            _write(comparison, *files)
    except (ValueError, OSError) as error:
        fail(error)
    if options.json:
        print(strict_json(comparison))
    else:
        from esper_lightning.comparison.text import describe  # noqa: PLC0415

        print(describe(comparison))


def compare_runs(
    paths: Sequence[Path], *, baseline: str | None = None, score: "Score | None" = None
) -> "Comparison":
    """Compare the runs at and below some paths; a run that cannot be read becomes a note.

    Ends the process with one line if a package is missing.

    Raises:
        ValueError: If the runs cannot be compared.
    """
    _require_installed(_NEEDED)
    from esper_lightning.comparison.runs import find_runs, read_run  # noqa: PLC0415
    from esper_lightning.comparison.scores import compare  # noqa: PLC0415
    from esper_lightning.comparison.variants import group  # noqa: PLC0415

    runs: list[Run] = []
    unreadable: list[str] = []
    for directory in find_runs(paths):
        try:
            runs.append(read_run(directory))
        except (ValueError, OSError) as error:
            unreadable.append(f"Left out, unreadable: {error}")
    if not runs:
        raise ValueError(" ".join(unreadable))
    variants = group(runs)
    return compare(variants, baseline=baseline, score=score, notes=unreadable)


def _files(directory: Path) -> tuple[Path, Path, Path]:
    """Paths of the text, the figure and the page in the folder of ``--output``.

    Raises:
        ValueError: If one of them cannot be written, which is found before the runs are read.
    """
    from esper_lightning.cli.pages.elements import PAGE_BEGINS  # noqa: PLC0415
    from esper_lightning.comparison.text import TEXT_BEGINS  # noqa: PLC0415

    require_output_folder("--output", directory)
    kinds = ((".md", TEXT_BEGINS), (".png", PICTURE_BEGINS), (".html", PAGE_BEGINS))
    text, picture, page = (
        require_output("--output", directory / f"comparison{suffix}", "comparison", begins)
        for suffix, begins in kinds
    )
    return text, picture, page


def _write(comparison: "Comparison", text: Path, picture: Path, page: Path) -> None:
    from esper_lightning.cli.pages.comparison_page import comparison_page  # noqa: PLC0415
    from esper_lightning.comparison.figure import draw  # noqa: PLC0415
    from esper_lightning.comparison.text import describe  # noqa: PLC0415

    shown = "![Learning curves and scores](comparison.png)\n"
    write_atomically(text, f"{describe(comparison, markdown=True)}\n{shown}".encode())
    draw(comparison, picture)
    write_atomically(page, comparison_page(comparison).encode())


def _require_installed(needed: Mapping[str, str]) -> None:
    absent = [needed[name] for name in needed if not _is_installed(name)]
    if absent:
        how = "pip install 'esper_lightning[compare]'"
        fail(f"esper compare needs {' and '.join(absent)}: {how}")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
