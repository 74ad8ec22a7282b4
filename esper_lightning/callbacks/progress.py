"""One progress bar for the whole run, in environment steps."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override

__all__ = ["RunProgressBar"]


class RunProgressBar(ProgressBar):
    """Shows the mean return of recent episodes, env-steps/s, and the remaining time of the run.

    The bar is for ``PPO``. It is written to stderr; every ten seconds where that is not a terminal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    @override
    def disable(self) -> None:
        """Show nothing, as on ranks other than 0."""
        self._enabled = False

    @override
    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the bar before the first iteration: only then the module knows the last step."""
        if self._bar is not None:
            return
        interval_s = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            desc="Training",
            total=getattr(pl_module, "planned_env_steps", None),
            initial=getattr(pl_module, "env_steps", 0),
            unit=" env steps",
            unit_scale=True,
            mininterval=interval_s,
            dynamic_ncols=True,
            disable=not self._enabled,
        )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar to the environment steps of the module."""
        if self._bar is not None:
            recent = trainer.progress_bar_metrics.get("return")
            if recent is not None:
                self._bar.set_postfix({"return": f"{recent:.1f}"}, refresh=False)
            self._bar.update(getattr(pl_module, "env_steps", trainer.global_step) - self._bar.n)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar as it is."""
        self._close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar if the run did not reach its end."""
        self._close()

    @override
    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print a line above the bar."""
        tqdm.write(sep.join(map(str, args)))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
