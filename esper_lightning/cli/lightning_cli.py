"""``esper fit`` and ``esper evaluate``.

Lightning's command line with our defaults and one-line errors.
"""

import argparse
import contextlib
import json
import logging
import os
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar, early_stopping
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
)
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

import esper_lightning.envs  # pyright: ignore[reportUnusedImport] - to be named in a config, specs
import esper_lightning.policies  # pyright: ignore[reportUnusedImport] - must be known
from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.lightning_internals import parse_checkpoint_path
from esper_lightning.callbacks.run_directory import run_directory
from esper_lightning.cli.errors import fail, nearest
from esper_lightning.cli.settings import SettingsParser
from esper_lightning.core.errors import require, requires_folder
from esper_lightning.core.ranks import RanksDisagreeError
from esper_lightning.envs.base import ReadsData
from esper_lightning.ppo.metrics import EVAL_RETURN
from esper_lightning.recorder.flight_recorder import FlightRecorder
from esper_lightning.train import begin_run, newest_run, run_callbacks, run_logger, run_plugins
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.states import (
    checkpoint_at,
    keep_own_extensions,
    load_checkpoint,
    load_weights,
    refuse_huge,
)
from esper_lightning.training.module import PPO
from esper_lightning.training.special_evaluations import (
    require_special_evaluation,
    special_evaluation,
)
from esper_lightning.training.trainer_rules import refuse_trainer

__all__ = ["prepare", "settings_come_first"]

_CONFIG_ERRORS = (argparse.ArgumentError, ValueError, TypeError, OSError, MisconfigurationException)
_NOT_BAREBONES = {
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}
_TRAINER_DEFAULTS = {"max_epochs": -1, "devices": 1, **_NOT_BAREBONES}
_LIGHTNING_CALLBACKS = Path(early_stopping.__file__).parent
_PACKAGE = Path(esper_lightning.__file__).parent


def prepare(arguments: list[str]) -> Callable[[], None]:
    """Parse the settings and build everything from them.

    A mistake in the settings is one line on stderr and exit status 2; what happens later is not
    touched.

    Returns:
        A function that trains or evaluates, and prints what came of it.
    """
    # Lightning's use of torch's internals and its advertisements are not the user's business.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
    # A run that goes on is to find its checkpoints, and one that begins none.
    for text in ("Checkpoint directory .* exists", r".*ckpt_path=.last.\) is set, but there is no"):
        warnings.filterwarnings("ignore", message=text, category=UserWarning)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
    with settings_come_first():
        cli = EsperCLI(
            arguments[0],
            model_class=PPO,
            args=arguments,
            trainer_class=EsperTrainer,
            trainer_defaults=dict(_TRAINER_DEFAULTS),
            save_config_callback=None,  # ``begin_run`` writes it
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=SettingsParser,
            parser_kwargs={
                arguments[0]: {"exit_on_error": False, "allow_abbrev": False},
                "exit_on_error": False,
                "allow_abbrev": False,
                "prog": "esper",
            },
        )
    return cli.execute


@contextmanager
def settings_come_first() -> Generator[None]:
    """Whatever goes wrong within is a mistake in the settings, and is all that is printed.

    What is logged and warned of meanwhile appears once the settings are known to be good. An error
    that is no statement about settings is a bug, of a class that the user named perhaps: its line
    says where. ``JSONARGPARSE_DEBUG=true`` shows the traceback of any.
    """
    held: list[Callable[[], object]] = []
    names = (None, "lightning.pytorch", "lightning.fabric")
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    filters = [(handler, _Hold(handler, held)) for handler in handlers]
    for handler, hold in filters:
        handler.addFilter(hold)
    show = warnings.showwarning

    def hold_warning(*args: Any, **kwargs: Any) -> None:
        held.append(partial(show, *args, **kwargs))

    warnings.showwarning = hold_warning
    try:
        yield
    except Exception as error:
        if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            raise
        fail(_tell(error))
    finally:
        warnings.showwarning = show
        for handler, hold in filters:
            handler.removeFilter(hold)
    for emit in held:
        emit()


class _Hold(logging.Filter):
    """Keeps the records of a handler for later."""

    def __init__(self, handler: logging.Handler, held: list[Callable[[], object]]) -> None:
        super().__init__()
        self._handler, self._held = handler, held

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        self._held.append(partial(self._handler.handle, record))
        return False


def _tell(error: Exception) -> str:
    """What an error says; of one that is not about settings, or raised by a user's code, where."""
    while "any of the Union subtypes" in str(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what a class said that could not be built
    said = str(error)
    if not isinstance(error, _CONFIG_ERRORS) or not said:
        said = f"{type(error).__name__}: {said}"
    libraries = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(_PACKAGE))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))]
    if own and (own[-1] is frames[-1] or not isinstance(error, _CONFIG_ERRORS)):
        return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno})"
    return said


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

        Of growing networks, it is then compared with baselines on hosts that nobody has seen.

        Args:
            model: Built from the settings in the checkpoint.
            ckpt_path: Checkpoint to evaluate, or a run directory for its best one.
            figures: Folder for figures of three episodes of growing networks; none if not given.
        """
        del figures  # drawn when this is over
        checkpoint = load_checkpoint(ckpt_path)
        keep_own_extensions(checkpoint, model)
        model.load_state_dict(checkpoint["state_dict"])
        self.validate(model, verbose=False)


class EsperCLI(LightningCLI):
    """Lightning's command line for PPO.

    Training starts in ``execute``, when all settings are known to be good.
    """

    model: PPO
    subcommand: str
    _run_dir: str | Path | None = None
    _start: Callable[[], None]
    _says: Sequence[str] = ()
    _resumes_from: int = 0

    _checkpoint: dict[str, Any] | None = None  # whose networks are built

    def __init__(self, command: str, **kwargs: Any) -> None:
        self._command = command
        super().__init__(**kwargs)

    @override
    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What is to be done, and which arguments of the Trainer's method are not the user's.

        Not all that can be: the parser of each takes a tenth of a second to make.
        """
        return {self._command: {"model"}}

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; ``evaluate`` starts from the settings in the checkpoint."""
        words = cast(list[str], args)
        for config in cast(list[str], _options().parse_known_args(words)[0].config or []):
            with suppress(OSError, ValueError):  # the settings themselves, perhaps
                if Path(config).is_fifo():
                    fail(f"--config must name a file, got {config!r}, which is a pipe.")
        if words[:1] == ["evaluate"] and not {"-h", "--help"} & set(words):
            known, _ = _options().parse_known_args(words[1:])
            require(known.ckpt_path is not None, "--ckpt_path", "be given", None)
            path = checkpoint_at(known.ckpt_path)
            self._says = [] if str(path) == known.ckpt_path else [f"Checkpoint: {path}"]
            self._checkpoint = load_checkpoint(path)
            # Extensions are of use in training alone; their classes may not be here.
            model = cast(dict[str, Any], self._checkpoint["hyper_parameters"])
            settings: dict[str, Any] = {"model": {**model, "extensions": []}}
            words = ["evaluate", "--config", json.dumps(settings), *words[1:]]
            words += ["--ckpt_path", str(path)]
        self.config = parser.parse_args(words)

    @override
    def _parse_ckpt_path(self) -> None:
        """Settings are the user's.

        Those of the checkpoint must agree with them, and never replace them.
        """

    @override
    def before_instantiate_classes(self) -> None:
        """Refuse what Lightning would refuse in too many words."""
        strategy = self._get(self.config, "trainer")["strategy"]
        known = ["auto", *cast(list[str], StrategyRegistry.available_strategies())]
        ok = not isinstance(strategy, str) or strategy in known
        hint = nearest(str(strategy), known).strip()
        require(ok, "trainer.strategy", "be 'ddp', or 'auto' with one device", strategy, hint)

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
        run_dir = self._get(self.config_init, "run_dir")
        require(run_dir != "", "--run_dir", "name a directory", run_dir)
        if run_dir is None and self._get(self.config_init, "ckpt_path") == "last":
            run_dir = newest_run(self.model.env)
        self._run_dir = run_dir
        if settings["logger"] in (None, True) and leaves_files:
            root, hint = settings["default_root_dir"], "--run_dir says where a run writes."
            require(root is None, "trainer.default_root_dir", "be null", str(root), hint)
            kwargs["logger"] = run_logger(self.model.env, run_dir)
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
        path = self.config[self.subcommand]["ckpt_path"]
        fits = self.subcommand == "fit"
        refuse_trainer(self.trainer, model.settings, fits=fits)
        if isinstance(model.env, ReadsData):
            model.env.check_data(self.trainer.strategy.root_device)
        if path in ("last", "best", "hpc"):  # a file, by the name that Lightning gives it
            path = parse_checkpoint_path(self.trainer, path)
            if path is None:
                self._says = ["No checkpoint to resume from (--ckpt_path last): a new run begins."]
        if path is not None:
            ranks = self.trainer.world_size if fits else None
            checkpoint = load_checkpoint(path)
            model.refuse_checkpoint(checkpoint, str(path), world_size=ranks)
            self._resumes_from = checkpoint[STATE_KEY]["iteration"]
        elif fits and model.settings.warm_start is not None:
            load_weights(model, model.settings.warm_start)
        figures = None if fits else self.config_init["evaluate"]["figures"]
        if figures is not None:
            require_special_evaluation(type(model.env), "--figures").refuse_figures(figures)
        if fits and not self.trainer.barebones:  # last: nothing is left where anything is refused
            config = self._parser("fit").dump(self.config["fit"], skip_none=False)
            field = "The run directory" if self._run_dir is None else "--run_dir"
            with requires_folder(field, self._run_dir):
                begin_run(self.trainer, model.env, self._run_dir, config)

    def fit(self, **kwargs: Any) -> None:
        """Remember to train."""
        self._start = lambda: self.trainer.fit(**kwargs)

    def evaluate(self, **kwargs: Any) -> None:
        """Remember to evaluate."""
        self._start = lambda: cast(EsperTrainer, self.trainer).evaluate(**kwargs)

    def execute(self) -> None:
        """Do it, and print what came of it."""
        if self.trainer.is_global_zero and self._says:
            print(*self._says, sep="\n", flush=True)
        try:
            self._start()
        except RanksDisagreeError as error:
            fail(error)
        except Exception as error:
            if self.model.is_resuming:
                path = self.config[self.subcommand]["ckpt_path"]
                reason = f"{type(error).__name__}: {error}"
                fail(f"ckpt_path must hold what a run can resume from, got {path!r}. {reason}")
            began = self.model.iteration > self._resumes_from
            early = isinstance(error, MisconfigurationException) and not began
            if not early and not _is_refusal_of_callback(error):
                raise
            fail(error)
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
        evaluates = self.subcommand == "evaluate"
        special = special_evaluation(type(self.model.env)) if evaluates else None
        if special is not None:
            device = self.trainer.strategy.root_device
            figures = self.config_init["evaluate"]["figures"]
            print(special.compare_policies(self.model, device, figures=figures))
        if self.subcommand == "fit":
            steps, seconds = self.model.env_steps, self.model.progress.train_time_s
            rate = steps / seconds if seconds > 0 else 0.0
            print(f"Trained for {steps:,} env steps in {seconds:.1f} s: {rate:,.0f} env-steps/s")
            directory = run_directory(self.trainer)
            if directory is not None:
                with suppress(ValueError, OSError):  # elsewhere; or nowhere: it was removed
                    directory = directory.relative_to(Path.cwd())
                print(f"Run directory: {directory}")


def _is_refusal_of_callback(error: Exception) -> bool:
    """Whether one of Lightning's own callbacks says that its settings are wrong.

    ``EarlyStopping`` and ``ModelCheckpoint`` look for what they monitor only after an epoch.
    """
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent
    refuses = isinstance(error, MisconfigurationException | RuntimeError)
    return refuses and raised_in == _LIGHTNING_CALLBACKS


def _options() -> argparse.ArgumentParser:
    """Those that are looked at before Lightning's parser is."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--config", action="append")
    return parser
