"""The evidence of a death as one file, small enough to be sent: ``crash.zip``.

Unpacked, the file is a run directory that ``esper crash`` reads. Checkpoints are not in it, nor
what is too large.
"""

import zipfile
from pathlib import Path

from esper_lightning.forensics.files import replacing
from esper_lightning.forensics.layout import RunLayout

__all__ = ["write_bundle"]

_MOST_BYTES = 32 << 20  # of all files together, before they are packed
_PATTERNS = (
    "config.yaml",
    "rank*/*.json*",
    "rank*/*.txt",
    "rank*/*.ring",
    "rank*/nan.pt",
    "rank*/trace/*.json*",
    "rank*/evidence/**/*",
)


def write_bundle(directory: Path) -> Path | None:
    """Pack the evidence of the latest death in a run directory, unless that is done already.

    The smallest files come first, so that one that is too large displaces no other.

    Returns:
        The file; ``None`` if no rank has died.

    Raises:
        OSError: If the disk takes no more.
    """
    layout = RunLayout(directory)
    reports = [path for path in directory.glob("rank*/crash.json") if path.is_file()]
    if not reports:
        return None
    bundle = layout.crash_bundle
    latest = max(path.stat().st_mtime for path in reports)
    if bundle.is_file() and bundle.stat().st_mtime > latest:
        return bundle
    found = {path for pattern in _PATTERNS for path in directory.glob(pattern) if path.is_file()}
    sizes = sorted((path.stat().st_size, path) for path in found)
    taken = 0
    with (
        replacing(bundle) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as file,
    ):
        for size, path in sizes:
            taken += size
            if taken > _MOST_BYTES:
                break
            file.write(path, path.relative_to(directory))
    return bundle
