"""The end of a run for its environments: the resources of simulators are released."""

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

__all__ = ["CloseEnvironments"]


class CloseEnvironments(Callback):
    """Closes the environments of a ``PPO`` module at the end of a run, however the run ends."""

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the environments after a run that finished."""
        _close(pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the environments after a run that an error or a signal ended."""
        _close(pl_module)


def _close(module: LightningModule) -> None:
    close = getattr(module, "close_environments", None)
    if callable(close):
        close()
