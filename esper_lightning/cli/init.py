"""``esper init DIR``: a small project with an environment, a config and tests, to begin from."""

import shutil
from pathlib import Path

from esper_lightning.cli.errors import CommandParser, fail, local_path

__all__ = ["run"]

_TEMPLATE = Path(__file__).with_name("project")
_FILES = ("README.md", "config.yaml", "environment.py", "test_environment.py")


def run(arguments: list[str]) -> None:
    """Write the files of the project; exit with status 2 if one of them is there already."""
    parser = CommandParser("esper init", "Write a small project to begin from.")
    parser.add_argument("directory", type=local_path, metavar="DIR", help="new or empty")
    folder: Path = parser.parse_args(arguments).directory.resolve()  # "new/../.." is no new folder
    try:
        if folder.exists() and any(folder.iterdir()):
            fail(f"DIR must be a new or an empty folder, got {str(folder)!r}.")
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            shutil.copyfile(_TEMPLATE / name, folder / name)
    except OSError as error:
        fail(f"DIR must be a folder that can be made ({error.strerror}), got {str(folder)!r}.")
    print(f"Wrote {', '.join(_FILES)} into {folder}. Next:\n")
    print(
        f"  cd {folder}\n  pip install pytest\n  python -m pytest\n  esper fit --config config.yaml"
    )
