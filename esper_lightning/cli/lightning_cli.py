"""``esper fit``, ``evaluate`` and ``bench``: Lightning's command line with errors of one line."""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

import esper_lightning.envs  # pyright: ignore[reportUnusedImport] - to be named in a config, specs
import esper_lightning.policies  # noqa: F401 # pyright: ignore[reportUnusedImport] - must be known
from esper_lightning.callbacks.lightning_internals import calm
from esper_lightning.callbacks.run_directory import run_directory, withdraw_run
from esper_lightning.cli import shipped
from esper_lightning.cli.dry_run import plan
from esper_lightning.cli.errors import fail, nearest
from esper_lightning.cli.launcher import tell_launchers
from esper_lightning.cli.mistakes import settings_come_first
from esper_lightning.cli.pages.live_page import LivePage
from esper_lightning.cli.refusals import refusal
from esper_lightning.cli.setting_help import HELP_TRAINER, HelpTrainer, usage_of
from esper_lightning.cli.settings import SettingsParser
from esper_lightning.cli.trainer import EsperTrainer, refuse_bench
from esper_lightning.core.errors import require, require_name
from esper_lightning.core.paths import requires_folder
from esper_lightning.core.ranks import RanksDisagreeError
from esper_lightning.envs.base import ReadsData
from esper_lightning.train import begin_run, run_logger, run_plugins, runs_folder
from esper_lightning.trainer import default_callbacks, results_of
from esper_lightning.training.checkpoint.meeting import tells_other_ranks
from esper_lightning.training.checkpoint.start import (
    Start,
    find_start,
    resumed_directory,
    settle_start,
)
from esper_lightning.training.checkpoint.states import (
    checkpoint_at,
    load_checkpoint,
    load_weights,
    refuse_huge,
)
from esper_lightning.training.module import PPO
from esper_lightning.training.special_evaluations import (
    require_special_evaluation,
    special_evaluation,
)
from esper_lightning.training.specs import refuse_opaque
from esper_lightning.training.trainer_rules import refuse_trainer
from esper_lightning.training.video import record_video, refuse_video

__all__ = ["prepare"]

_MOST_SEED = 2**32 - 1
_GPUS = {  # accelerators by their names
    "gpu": (CUDAAccelerator, MPSAccelerator),
    "cuda": (CUDAAccelerator,),
    "mps": (MPSAccelerator,),
}
_NOT_BAREBONES = {
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}
_PROFILERS = ("simple", "advanced", "pytorch", "xla")
_TRAINER_DEFAULTS = {"max_epochs": -1, "devices": 1, **_NOT_BAREBONES}


def prepare(arguments: list[str]) -> Callable[[], None]:
    """Parse the settings, and build model and Trainer from them.

    A mistake in the settings is one line on stderr and exit status 2; later errors are not changed.

    Returns:
        A function that trains or evaluates, and prints the results.
    """
    # A resumed run is meant to find its checkpoints.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists", category=UserWarning)
    with settings_come_first(), calm():
        cli = EsperCLI(
            arguments[0],
            model_class=PPO,
            args=arguments,
            trainer_class=EsperTrainer,
            trainer_defaults=dict(_TRAINER_DEFAULTS),
            save_config_callback=None,  # ``begin_run`` writes the config
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=SettingsParser,
            parser_kwargs={
                arguments[0]: {
                    "exit_on_error": False,
                    "allow_abbrev": False,
                    "usage": usage_of(arguments[0]),
                },
                "exit_on_error": False,
                "allow_abbrev": False,
                "prog": "esper",
            },
        )
    return partial(tell_launchers, cli.execute, partial(run_directory, cli.trainer))


class EsperCLI(LightningCLI):
    """Lightning's command line for PPO; training starts in ``execute``, after every check."""

    model: PPO
    subcommand: str
    _run_dir: str | Path | None = None
    _page: LivePage | None = None
    _is_dry: bool = False
    _start: Callable[[], None]
    _says: Sequence[str] = ()
    _resumes_from: int = 0

    _checkpoint: dict[str, Any] | None = None  # holds the settings of an evaluation

    def __init__(self, command: str, **kwargs: Any) -> None:
        self._command = command
        super().__init__(**kwargs)

    @override
    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The one subcommand that was given, with the arguments that Lightning passes itself.

        The others are omitted, because the parser of each takes a tenth of a second to build.
        """
        return {self._command: {"model"}}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the option that shows Lightning's settings, which ``--help`` omits."""
        parser.add_argument(HELP_TRAINER, action=HelpTrainer, help="Show those of Lightning.")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments; ``evaluate`` starts from the settings in the checkpoint."""
        words = shipped.with_paths(cast(list[str], args))
        for config in cast(list[str], _options().parse_known_args(words)[0].config or []):
            with suppress(OSError, ValueError):  # the word may be the settings, and no path
                if Path(config).is_fifo():
                    fail(f"--config must name a file, got {config!r}, which is a pipe.")
        if words[:1] == ["evaluate"] and not {"-h", "--help", HELP_TRAINER} & {*words}:
            known, _ = _options().parse_known_args(words[1:])
            require(known.ckpt_path is not None, "--ckpt_path", "be given", None)
            path = checkpoint_at(known.ckpt_path)
            self._says = [] if str(path) == known.ckpt_path else [f"Checkpoint: {path}"]
            self._checkpoint = load_checkpoint(path)
            # Extensions are of use in training alone; their classes may not be here.
            model = cast(dict[str, Any], self._checkpoint["hyper_parameters"])
            settings: dict[str, Any] = {"model": {**model, "extensions": []}}
            refuse_opaque("model", settings["model"])
            words = ["evaluate", "--config", json.dumps(settings), *words[1:]]
            words += ["--ckpt_path", str(path)]
        self.config = parser.parse_args(cast(SettingsParser, parser).with_flags(words))

    @override
    def _parse_ckpt_path(self) -> None:
        """Use the user's settings: those of a checkpoint must agree, and never replace them."""

    @override
    def _set_seed(self) -> None:
        """Refuse a seed that no generator accepts; Lightning's error does not name the setting."""
        seed = self._get(self.config, "seed_everything")
        ok = isinstance(seed, bool) or 0 <= seed <= _MOST_SEED
        rule = f"be true or false, or an integer from 0 to {_MOST_SEED}"
        require(ok, "seed_everything", rule, seed)
        super()._set_seed()

    @override
    def before_instantiate_classes(self) -> None:
        """Refuse settings for which Lightning's error is long, or does not name the setting."""
        trainer = self._get(self.config, "trainer")
        strategy, longest = trainer["strategy"], trainer["max_time"]
        known = ["auto", *cast(list[str], StrategyRegistry.available_strategies())]
        accelerator = trainer["accelerator"]
        has = [kind.is_available() for kind in _GPUS.get(str(accelerator), ())]
        rule, hint = "be one that this machine has", "'auto' is the best that there is."
        require(not has or any(has), "trainer.accelerator", rule, accelerator, hint)
        ok = not isinstance(strategy, str) or strategy in known
        hint = nearest(str(strategy), known).strip()
        require(ok, "trainer.strategy", "be 'ddp', or 'auto' with one device", strategy, hint)
        try:
            ok = (Timer(duration=longest).time_remaining() or 0.0) >= 0.0
        except (MisconfigurationException, TypeError, OverflowError):
            ok = False
        rule = "be DD:HH:MM:SS, or a mapping of days, hours, minutes and seconds"
        require(ok, "trainer.max_time", rule, longest)
        _refuse_profiler(trainer["profiler"])

    @override
    def instantiate_classes(self) -> None:
        """Build model and Trainer; refuse settings of a checkpoint that would take all memory."""
        given = self._checkpoint
        with contextlib.nullcontext() if given is None else refuse_huge(given):
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add logger and callbacks that every run has, unless the user chose otherwise."""
        settings = self._get(self.config_init, "trainer")
        kwargs["plugins"] = run_plugins(settings["plugins"], settings["strategy"])
        if self.subcommand != "fit":
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            return super().instantiate_trainer(**kwargs, **quiet)
        self._is_dry = self._get(self.config_init, "dry_run")
        run_dir = self._get(self.config_init, "run_dir")
        require_name("--run_dir", run_dir, "a directory")
        if settings["barebones"]:  # it also refuses the settings that we choose
            rule, hint = "be null with trainer.barebones=true", "Such a run writes no files."
            require(run_dir is None, "--run_dir", rule, str(run_dir), hint)
            kwargs |= dict.fromkeys(_NOT_BAREBONES)
            return super().instantiate_trainer(**kwargs)
        leaves_files = not settings["fast_dev_run"]
        self._run_dir = run_dir
        if settings["logger"] in (None, True) and leaves_files:
            root, hint = settings["default_root_dir"], "--run_dir says where a run writes."
            require(root is None, "trainer.default_root_dir", "be null", str(root), hint)
            kwargs["logger"] = run_logger(self.model.env, run_dir)
        callbacks: Any = settings["callbacks"] or []
        given = cast(list[Callback], callbacks if isinstance(callbacks, list) else [callbacks])
        self.trainer_defaults["callbacks"] = default_callbacks(
            given,
            evaluates=settings["limit_val_batches"] != 0,
            saves=settings["enable_checkpointing"] is not False and leaves_files,
            shows_progress=settings["enable_progress_bar"] is not False,
        )
        if self._get(self.config_init, "open_report"):
            self._page = LivePage()
            self.trainer_defaults["callbacks"].append(self._page)
        return super().instantiate_trainer(**kwargs)

    @override
    def after_instantiate_classes(self) -> None:
        """Refuse settings now that the run would refuse later, and claim the run directory."""
        with tells_other_ranks(self.trainer):
            self._refuse_or_begin()

    def _refuse_or_begin(self) -> None:
        model = self.model
        fits = self.subcommand == "fit"
        refuse_trainer(self.trainer, model.settings, fits=fits)
        if isinstance(model.env, ReadsData):
            model.env.check_data(self.trainer.strategy.root_device)
        name = self.config[self.subcommand].get("ckpt_path")
        named = self._run_dir is not None
        leaves_files = fits and not (self.trainer.barebones or cast(Any, self.trainer).fast_dev_run)
        if leaves_files and name == "last" and not named:
            folder = runs_folder(self.trainer, model.env)
            self._run_dir = resumed_directory(self.trainer, folder)
        start = find_start(self.trainer, name, self._run_dir if leaves_files else None)
        start.refuse(model, self.trainer, fits=fits)
        if start.checkpoint is None and model.settings.warm_start is not None:
            load_weights(model, model.settings.warm_start)
        evaluates = self.subcommand == "evaluate"
        figures = self.config_init["evaluate"]["figures"] if evaluates else None
        if figures is not None:
            require_special_evaluation(type(model.env), "--figures").refuse_figures(figures)
        video = self.config_init["evaluate"]["video"] if evaluates else None
        if video is not None:
            refuse_video(video)
        self._note_start(start)
        if self._is_dry:
            return
        if fits and not self.trainer.barebones:  # last: a refused run leaves no files
            config = self._parser("fit").dump(self.config["fit"], skip_none=False)
            field = "--run_dir" if named else "The run directory"
            with requires_folder(field, self._run_dir):
                begin_run(self.trainer, model.env, self._run_dir, config)
        if name is not None:
            start = settle_start(start, self.trainer, model, name, self._run_dir)
            self._note_start(start)
            for config in (self.config, self.config_init):
                config[self.subcommand]["ckpt_path"] = start.path

    def _note_start(self, start: Start) -> None:
        self._says = [start.said] if start.said else self._says
        self._resumes_from = start.iteration

    def fit(self, **kwargs: Any) -> None:
        """Have ``execute`` train; Lightning calls this method by the name of the command."""
        self._start = lambda: self.trainer.fit(**kwargs)

    def evaluate(self, **kwargs: Any) -> None:
        """Have ``execute`` evaluate; Lightning calls this method by the name of the command."""
        self._start = lambda: cast(EsperTrainer, self.trainer).evaluate(**kwargs)

    def bench(self, **kwargs: Any) -> None:
        """Have ``execute`` measure; Lightning calls this method by the name of the command."""
        kwargs["output"] = refuse_bench(**kwargs)
        self._start = lambda: cast(EsperTrainer, self.trainer).bench(**kwargs)

    @calm()
    def execute(self) -> None:
        """Train, evaluate or measure, and print the results."""
        if self.trainer.is_global_zero and self._says:
            print(*self._says, sep="\n", flush=True)
        if self._is_dry:
            if self.trainer.is_global_zero:
                begun, place = self._resumes_from, self._run_dir
                says = plan(self.model, self.trainer, resumes_from=begun, run_dir=place)
                print(*says, sep="\n")
            return
        try:
            self._start()
        except RanksDisagreeError as error:
            fail(error)
        except SystemExit as error:
            if error.code:
                raise
            sys.exit("esper: code of a setting has ended the process before the command was done.")
        except Exception as error:
            if self.model.is_resuming:
                self._refuse_to_resume(error)
            began = self.model.iteration > self._resumes_from
            said = refusal(error, began=began, measures=self.subcommand == "bench")
            if said is None:
                raise
            fail(said)
        finally:
            if self._page is not None and self.trainer.is_global_zero:
                self._page.write(self.trainer)
        if self.trainer.is_global_zero:
            self._print_results()

    def _refuse_to_resume(self, error: Exception) -> NoReturn:
        if isinstance(error, ValueError):  # after any other error, the report shows where a bug is
            self._page = None
            withdraw_run(self.trainer)
        path = self.config[self.subcommand]["ckpt_path"]
        reason = f"{type(error).__name__}: {error}"
        fail(f"ckpt_path must hold what a run can resume from, got {path!r}. {reason}")

    def _print_results(self) -> None:
        trained = self.subcommand == "fit"
        print(*results_of(self.trainer, self.model, trained=trained), sep="\n")
        evaluates = self.subcommand == "evaluate"
        special = special_evaluation(type(self.model.env)) if evaluates else None
        if special is not None:
            device = self.trainer.strategy.root_device
            figures = self.config_init["evaluate"]["figures"]
            print(special.compare_policies(self.model, device, figures=figures))
        video = self.config_init["evaluate"]["video"] if evaluates else None
        if video is not None:
            shown = record_video(self.model, video, device=self.trainer.strategy.root_device)
            print(f"Video: {video} (returns {', '.join(f'{each:.4g}' for each in shown)})")


def _refuse_profiler(profiler: Any) -> None:
    """Refuse a text that is no profiler of Lightning, such as a class with wrong arguments.

    The setting may be any text, so the parser accepts a class and arguments that do not fit.

    Args:
        profiler: Value of the setting.
    """
    if not isinstance(profiler, str) or profiler in _PROFILERS:
        return
    if profiler.lstrip().startswith("{"):  # a parser of classes alone says what does not fit
        parser = SettingsParser(exit_on_error=False)
        parser.add_argument("--trainer.profiler", type=Profiler)
        parser.parse_args([f"--trainer.profiler={profiler}"])
    rule = f"be one of {', '.join(_PROFILERS)}, or name a class of Profiler"
    require(False, "trainer.profiler", rule, profiler, nearest(profiler, _PROFILERS).strip())


def _options() -> argparse.ArgumentParser:
    """Parser of the options that are read before Lightning's parser is built."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--config", action="append")
    return parser
