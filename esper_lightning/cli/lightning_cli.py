"""``esper fit`` and ``esper evaluate``.

Lightning's command line with our defaults and one-line errors.
"""

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

import esper_lightning.envs  # pyright: ignore[reportUnusedImport] - to be named in a config, specs
import esper_lightning.policies  # noqa: F401  # pyright: ignore[reportUnusedImport] - must be known
from esper_lightning.callbacks.flight_recorder import FlightRecorder
from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.run_directory import run_directory
from esper_lightning.cli.growth import compare_policies, refuse_figures
from esper_lightning.comparison.runs import read_yaml
from esper_lightning.core.validate import require
from esper_lightning.envs import Morphogenesis
from esper_lightning.forensics.reading import one_line
from esper_lightning.train import run_callbacks, run_logger, run_plugins
from esper_lightning.training.checkpoints import (
    checkpoint_at,
    load_checkpoint,
    load_weights,
    refuse_huge,
)
from esper_lightning.training.metrics import EVAL_RETURN
from esper_lightning.training.module import PPO
from esper_lightning.training.trainer_support import refuse_unsupported

__all__ = ["CONFIG_ERRORS", "fail", "run"]

CONFIG_ERRORS = (argparse.ArgumentError, ValueError, TypeError, OSError, MisconfigurationException)
_NOT_BAREBONES = {
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}
_TRAINER_DEFAULTS = {"max_epochs": -1, "devices": 1, **_NOT_BAREBONES}


def run(arguments: list[str]) -> None:
    """Parse, train or evaluate, and print what came of it.

    A mistake in the settings is one line on stderr and exit status 2; what happens later is not
    touched.
    """
    # Lightning's use of torch's internals and its advertisements are not the user's business.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
    # A run that goes on is to find its checkpoints, and one that begins none.
    for text in ("Checkpoint directory .* exists", r".*ckpt_path=.last.\) is set, but there is no"):
        warnings.filterwarnings("ignore", message=text, category=UserWarning)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
    try:
        cli = EsperCLI(
            PPO,
            args=arguments,
            trainer_class=EsperTrainer,
            trainer_defaults=dict(_TRAINER_DEFAULTS),
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                name: {"exit_on_error": False, "allow_abbrev": False}
                for name in ("fit", "evaluate")
            }
            | {
                "exit_on_error": False,
                "allow_abbrev": False,
                "prog": "esper",
                "epilog": "esper export --help tells how to write a policy for elsewhere. "
                "esper crash RUN_DIR tells how a run died, esper compare RUN ... how variants did "
                "over the same seeds; they need no torch.",
            },
        )
    except CONFIG_ERRORS as error:
        fail(error)
    cli.execute()


class EsperTrainer(Trainer):
    """Lightning's Trainer, with the arguments that the command line is to have."""

    @override
    def fit(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: PPO, ckpt_path: str | None = None, run_dir: str | None = None
    ) -> None:
        """Train.

        Args:
            model: To train.
            ckpt_path: Checkpoint to go on from; ``last`` for that of the run directory, or of the
                newest run where none is given, or to begin where there is none.
            run_dir: Where the run writes; by default a new ``runs/<env>/version_<n>``.
        """
        del run_dir  # the logger has it by now
        super().fit(model, ckpt_path=ckpt_path, weights_only=True)

    def evaluate(self, model: PPO, ckpt_path: str, figures: Path | None = None) -> None:
        """Play deterministic evaluation episodes with the policy of a checkpoint.

        Of Morphogenesis, it is then compared with baselines on hosts that nobody has seen.

        Args:
            model: Built from the settings in the checkpoint.
            ckpt_path: Checkpoint to evaluate, or a run directory for its best one.
            figures: Folder for pictures of three episodes of Morphogenesis; none if not given.
        """
        del figures  # drawn when this is over
        model.load_state_dict(load_checkpoint(ckpt_path)["state_dict"])
        self.validate(model, verbose=False)


class SaveFitConfig(SaveConfigCallback):
    """``config.yaml`` in the run directory, of a training run only."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class EsperCLI(LightningCLI):
    """Lightning's command line for PPO.

    Training starts in ``execute``, when all settings are known to be good.
    """

    model: PPO
    subcommand: str
    _start: Callable[[], None]

    _checkpoint: dict[str, Any] | None = None  # whose networks are built

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """What can be done, and which arguments of the Trainer's method are not the user's."""
        return {
            "fit": {"model"},
            "evaluate": {"model"},
        }

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; ``evaluate`` starts from the settings in the checkpoint."""
        words = cast(list[str], args)
        for config in _options().parse_known_args(words)[0].config or []:
            if _is_there(config):
                read_yaml(Path(config))  # what cannot be read is said before Lightning tries
        if words[:1] == ["evaluate"] and not {"-h", "--help"} & set(words):
            known, _ = _options().parse_known_args(words[1:])
            require(known.ckpt_path is not None, "--ckpt_path", "be given", None)
            path = checkpoint_at(known.ckpt_path)
            if str(path) != known.ckpt_path:
                print(f"Checkpoint: {path}")
            self._checkpoint = load_checkpoint(path)
            settings = {"model": self._checkpoint["hyper_parameters"]}
            words = ["evaluate", "--config", json.dumps(settings), *words[1:]]
            words += ["--ckpt_path", str(path)]
        self.config = parser.parse_args(words)

    @override
    def _parse_ckpt_path(self) -> None:
        """Settings are the user's.

        Those of the checkpoint must agree with them, and never replace them.
        """

    @override
    def instantiate_classes(self) -> None:
        """Build model and Trainer; what a checkpoint asks for may not take all memory."""
        given = self._checkpoint
        with contextlib.nullcontext() if given is None else refuse_huge(given):
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has, unless the user chose otherwise."""
        settings = self._get(self.config_init, "trainer")
        kwargs["plugins"] = run_plugins(settings["plugins"], settings["strategy"])
        if self.subcommand == "evaluate":
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            return super().instantiate_trainer(**kwargs, **quiet)
        if settings["barebones"]:  # it refuses what we choose, too
            kwargs |= dict.fromkeys(_NOT_BAREBONES)
            return super().instantiate_trainer(**kwargs)
        leaves_files = not settings["fast_dev_run"]
        ours = settings["logger"] in (None, True)
        run_dir = self._get(self.config_init, "run_dir")
        hint = "The logger says where the run writes."
        require(ours or run_dir is None, "--run_dir", "be absent beside a logger", run_dir, hint)
        if ours and leaves_files:
            resumes = self._get(self.config_init, "ckpt_path") == "last"
            kwargs["logger"] = run_logger(self.model.env, run_dir, newest=resumes)
        callbacks: Any = settings["callbacks"] or []
        given = cast(list[Callback], callbacks if isinstance(callbacks, list) else [callbacks])
        saves = settings["enable_checkpointing"] is not False and leaves_files
        self.trainer_defaults["callbacks"] = run_callbacks(
            evaluates=settings["limit_val_batches"] != 0,
            saves=saves and not any(isinstance(callback, Checkpoint) for callback in given),
            shows_progress=settings["enable_progress_bar"] is not False
            and not any(isinstance(callback, ProgressBar) for callback in given),
            writes_history=not any(isinstance(callback, History) for callback in given),
            records=not any(isinstance(callback, FlightRecorder) for callback in given),
        )
        return super().instantiate_trainer(**kwargs)

    @override
    def after_instantiate_classes(self) -> None:
        """Refuse now what the run would refuse later."""
        model = self.model
        refuse_unsupported(self.trainer, num_envs=model.env.num_envs, budget=model.total_env_steps)
        path = self.config[self.subcommand]["ckpt_path"]
        fits = self.subcommand == "fit"
        if isinstance(model.env, Morphogenesis):
            model.env.splits(self.trainer.strategy.root_device)
        if path in ("last", "best", "hpc"):  # a file, by the name that Lightning gives it
            connector: Any = self.trainer._checkpoint_connector  # pyright: ignore[reportPrivateUsage]
            path = connector._parse_ckpt_path(
                TrainerFn.FITTING, path, model_provided=True, model_connected=False
            )
        if path is not None:
            ranks = self.trainer.world_size if fits else None
            model.refuse_checkpoint(load_checkpoint(path), str(path), world_size=ranks)
        elif fits and model.warm_start is not None:
            load_weights(model, model.warm_start)
        figures = None if fits else self.config_init["evaluate"]["figures"]
        if figures is not None:
            refuse_figures(model.env, figures)

    def fit(self, **kwargs: Any) -> None:
        """Remember to train."""
        self._start = lambda: self.trainer.fit(**kwargs)

    def evaluate(self, **kwargs: Any) -> None:
        """Remember to evaluate."""
        self._start = lambda: cast(EsperTrainer, self.trainer).evaluate(**kwargs)

    def execute(self) -> None:
        """Do it, and print what came of it."""
        try:
            self._start()
        except Exception as error:
            if not self.model.is_resuming:
                raise
            path = self.config[self.subcommand]["ckpt_path"]
            reason = f"{type(error).__name__}: {error}"
            message = f"ckpt_path must hold what a run can resume from, got {path!r}. {reason}"
            fail(ValueError(message))
        if not self.trainer.is_global_zero:
            return
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        name = type(self.model.env).__name__
        if EVAL_RETURN in metrics:
            print(
                f"{name}: mean return {metrics[EVAL_RETURN]:.1f} "
                f"(std {metrics['eval/episode_return_std']:.1f}) "
                f"over {metrics['eval/episodes']:.0f} deterministic evaluation episodes"
            )
        if self.subcommand == "evaluate" and isinstance(self.model.env, Morphogenesis):
            device = self.trainer.strategy.root_device
            figures = self.config_init["evaluate"]["figures"]
            print(compare_policies(self.model, device, figures=figures))
        if self.subcommand == "fit":
            steps, seconds = self.model.env_steps, self.model.train_time_s
            rate = steps / seconds if seconds > 0 else 0.0
            print(f"Trained for {steps:,} env steps in {seconds:.1f} s: {rate:,.0f} env-steps/s")
            directory = run_directory(self.trainer)
            if directory is not None and not self.trainer.barebones:
                print(f"Run directory: {directory}")


def _options() -> argparse.ArgumentParser:
    """Those that are looked at before Lightning's parser is."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--config", action="append")
    return parser


def _is_there(config: str) -> bool:
    """Whether a config is a path; it may be the settings themselves."""
    with contextlib.suppress(OSError, ValueError):
        return Path(config).exists()
    return False


def fail(error: BaseException) -> NoReturn:
    """Tell a mistake in one line; exit status 2."""
    print("esper: error: " + one_line(str(error)), file=sys.stderr)
    sys.exit(2)
