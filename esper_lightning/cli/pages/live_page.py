"""The page of a run that is running: ``esper fit --open_report``."""

import os
import sys
import time
import warnings
import webbrowser
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from esper_lightning.callbacks.run_directory import run_directory
from esper_lightning.cli.pages.elements import PAGE_BEGINS
from esper_lightning.cli.pages.run_page import PAGE, REFRESH_S, run_page
from esper_lightning.core.paths import require_output
from esper_lightning.forensics.files import write_atomically

__all__ = ["LivePage"]

_SHARE = 0.01  # of the training time that writing the page may take


class LivePage(Callback):
    """Writes the page of the run every ten seconds, and opens the page in a browser once.

    The page loads itself again until the run ends. A page that cannot be written is one warning,
    and training continues. Only the first rank writes.
    """

    def __init__(self) -> None:
        self._due_s = 0.0
        self._is_open = self._failed = False

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the page if the last one is old."""
        if trainer.is_global_zero and time.monotonic() >= self._due_s:
            self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write the page of the run as its files are now."""
        directory = run_directory(trainer)
        if directory is None or self._failed:
            return
        started = time.monotonic()
        try:
            path = require_output("--open_report", directory / PAGE, "page", PAGE_BEGINS)
            write_atomically(path, run_page(directory).encode())
        except (ValueError, OSError) as error:
            self._failed = True
            warnings.warn(f"The page of the run is not written: {error}", stacklevel=1)
            return
        now = time.monotonic()
        self._due_s = now + max(REFRESH_S, (now - started) / _SHARE)
        if not self._is_open:
            self._is_open = True
            _open(path)


def _open(path: Path) -> None:
    """Show a page in the user's browser, or say where it is if there is no screen."""
    has_screen = sys.platform in ("darwin", "win32")
    has_screen = has_screen or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if not (has_screen and webbrowser.open(path.absolute().as_uri())):
        print(f"Page: {path}", flush=True)
