"""``crash.json`` and ``process.json`` as other programs read them: plain JSON objects."""

import json
from pathlib import Path
from typing import Any


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Write a file of schema 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, **content}))


def read_report(path: Path) -> dict[str, Any] | None:
    """The content of a file; ``None`` where there is no file."""
    return json.loads(path.read_bytes()) if path.exists() else None
