"""Lightning's Trainer, whose methods are the commands of ``esper``."""

import json
from pathlib import Path

from lightning.pytorch import Trainer
from typing_extensions import override

from esper_lightning.core.errors import positive
from esper_lightning.core.paths import require_output
from esper_lightning.forensics.files import write_atomically
from esper_lightning.speed import measure_speed, other_sizes, speed_as_data, speed_table
from esper_lightning.training.checkpoint.states import keep_own_extensions, load_checkpoint
from esper_lightning.training.module import PPO

__all__ = ["EsperTrainer", "refuse_bench"]


def refuse_bench(
    model: PPO, num_envs: int | list[int] | None, seconds: float, output: Path | None
) -> Path | None:
    """Refuse arguments of ``EsperTrainer.bench`` before anything is measured.

    Returns:
        The file of ``output``; ``None`` where none is written.

    Raises:
        ValueError: If a number cannot be measured, or if ``output`` is a file of something else.
    """
    positive("seconds", seconds)
    other_sizes(model.settings, num_envs)
    begins = rb'\s*\{\s*"machine": '
    given = output is not None
    return require_output("--output", output, "file of esper bench", begins) if given else None


class EsperTrainer(Trainer):
    """Lightning's Trainer, whose methods have the arguments of the command line."""

    @override
    def fit(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: PPO,
        ckpt_path: str | None = None,
        run_dir: str | None = None,
        open_report: bool = False,
        dry_run: bool = False,
    ) -> None:
        """Train a model.

        Args:
            model: Model to train.
            ckpt_path: Checkpoint to resume from. ``last`` is the last one of the run directory, or
                of the newest run where no directory is given; a new run begins where there is none.
            run_dir: Directory that the run writes to; by default a new ``runs/<env>/version_<n>``.
            open_report: Open a page of the run in a browser, and renew it while the run goes on.
            dry_run: Only print what the run would do and take: nothing is trained or written.
        """
        del run_dir, open_report, dry_run  # the logger, a callback and ``execute`` use them
        super().fit(model, ckpt_path=ckpt_path, weights_only=True)

    def evaluate(
        self,
        model: PPO,
        ckpt_path: str,
        figures: Path | None = None,
        video: Path | None = None,
    ) -> None:
        """Play deterministic evaluation episodes with the policy of a checkpoint.

        Where the environment has baselines, the policy is then compared with them, in episodes that
        are new to it.

        Args:
            model: Model that was built from the settings in the checkpoint.
            ckpt_path: Checkpoint to evaluate, or a run directory for its best one.
            figures: Folder for figures of three episodes, where the environment has figures; by
                default no figure is made.
            video: File for a video of the best, the median and the worst of ten episodes, as MP4,
                where the environment draws pictures; by default no video is made.
        """
        del figures, video  # ``execute`` makes them after the evaluation
        checkpoint = load_checkpoint(ckpt_path)
        keep_own_extensions(checkpoint, model)
        model.load_state_dict(checkpoint["state_dict"])
        self.validate(model, verbose=False)

    def bench(
        self,
        model: PPO,
        num_envs: int | list[int] | None = None,
        seconds: float = 3.0,
        output: Path | None = None,
    ) -> None:
        """Measure how fast a model trains on this machine, and what the time goes to.

        Nothing is trained but for the measurement. Of the Trainer's settings, only the accelerator
        is used.

        Args:
            model: Model to measure, with ``compile=off`` and with its own mode.
            num_envs: Number of environments to try as well, or a list such as ``[16, 256]``; by
                default some are chosen.
            seconds: Seconds of each measurement, compilation not counted.
            output: File that gets the figures as JSON; by default none is written.
        """
        settings, accelerator = model.settings, self.accelerator.name()
        found = measure_speed(settings, accelerator=accelerator, num_envs=num_envs, seconds=seconds)
        print(speed_table(found, settings))
        if output is not None:
            content = json.dumps(speed_as_data(found, settings), indent=1) + "\n"
            write_atomically(output, content.encode())
