"""A training run that fails where its configuration says so: ``python program.py '<json>'``.

The configuration is that of ``cases.Case.config``. Beside the run directory the program keeps
files of its own, from which the harness knows what happened: each finished iteration, the
moment of the fault, and how the process was once ``fit`` had raised.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from injection import Fault, note
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from torch import Tensor
from torch.profiler import schedule
from torch.utils.data import DataLoader, Dataset

from esper_lightning import MLP, PPO, PPOConfig
from esper_lightning.callbacks.flight_recorder import FlightRecorder
from esper_lightning.callbacks.window_profiler import WindowProfiler
from esper_lightning.envs import CartPole

STEPS = 10
_STEP_SITES = {"training_step", "forward", "backward", "autograd_hook", "optimizer_step", "logger"}
_STEP_SITES |= {"on_train_batch_start", "on_train_batch_end", "rollout", "update"}


class Sites:
    """Where the fault may strike: a module's mixin that counts steps and hooks."""

    config: dict[str, Any]
    fault: Fault
    step = -1

    def prepare(self, config: dict[str, Any]) -> None:
        self.config, self.fault = config, Fault(config)

    def site(self, name: str) -> None:
        trainer: Trainer = self.trainer  # type: ignore[attr-defined]
        wanted = self.config["site"] == name and self.config["rank"] in (trainer.global_rank, -1)
        if wanted and (name not in _STEP_SITES or self.step == self.config["at"]):
            profiler = getattr(trainer.profiler, "kept", trainer.profiler)
            self.fault.strike(profiler, trainer.global_rank)

    def on_fit_start(self) -> None:
        self.site("on_fit_start")

    def on_train_epoch_end(self) -> None:
        self.site("on_train_epoch_end")

    def on_train_end(self) -> None:
        self.site("on_train_end")

    def teardown(self, stage: str) -> None:
        self.site("teardown")


class Rows(Dataset[Tensor]):
    """Random rows; the one of the failing step fails in whichever process loads it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def __len__(self) -> int:
        return 4 * STEPS * self.config["world_size"]

    def __getitem__(self, index: int) -> Tensor:
        if self.config["site"] == "dataset" and index == 4 * self.config["at"]:
            Fault(self.config).strike(None, 0)
        return torch.randn(8, generator=torch.Generator().manual_seed(index))


class _SGD(torch.optim.SGD):
    site: Any = None

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.site("optimizer_step")
        super().step()
        return loss


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, site: Any) -> Tensor:
        ctx.site = site
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.site("backward")
        return gradient, None


class Plain(Sites, LightningModule):
    """An ordinary supervised module that logs its loss."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.prepare(config)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )

    def setup(self, stage: str) -> None:
        self.site("setup")

    def on_train_start(self) -> None:
        self.site("on_train_start")

    def forward(self, x: Tensor) -> Tensor:
        self.site("forward")
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = _Gradient.apply(self(batch), self.site).square().mean()
        if self.config["site"] == "autograd_hook":
            loss.register_hook(lambda _: self.site("autograd_hook"))
        self.log("loss", loss)
        self.site("training_step")
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())
        self.site("sanity_check" if self.trainer.sanity_checking else "validation_step")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = _SGD(self.parameters(), lr=0.01)
        optimizer.site = self.site
        return optimizer

    def train_dataloader(self) -> DataLoader[Tensor]:
        workers = self.config["options"].get("workers", 0)
        return DataLoader(Rows(self.config), batch_size=4, num_workers=workers)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Rows({**self.config, "site": None}), batch_size=4)


class FaultyPPO(Sites, PPO):
    """CartPole."""

    def __init__(self, config: dict[str, Any]) -> None:
        ppo = PPOConfig(rollout_steps=8, minibatches=2, epochs=2)
        super().__init__(CartPole(num_envs=16), MLP(hidden_sizes=(16,)), ppo, 0)
        self.prepare(config)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.site("setup")
        take_step = self._env.step

        def step(*arguments: Any, **settings: Any) -> Any:
            self.site("rollout")
            return take_step(*arguments, **settings)

        self._env.step = step

    def on_train_start(self) -> None:
        super().on_train_start()
        self.site("on_train_start")

    def manual_backward(self, loss: Tensor, *arguments: Any, **settings: Any) -> None:
        super().manual_backward(loss, *arguments, **settings)
        self.site("update")

    def training_step(self, batch: int, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        self.site("training_step")
        return result


class Steps(Callback):
    """First of the user's callbacks: numbers the steps; fails too if it is to."""

    def __init__(self, config: dict[str, Any], *, when: str) -> None:
        self.config, self.when = config, when

    def _site(self, module: Any, hook: str) -> None:
        if self.config["options"].get("callback") == self.when:
            module.site(hook)

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, i: int) -> None:
        module.step = i
        self._site(module, "on_train_batch_start")

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        self._site(module, "on_train_batch_end")

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        options = self.config["options"]
        if options.get("linger_s") and self.when == "after":
            time.sleep(options["linger_s"])  # sockets stay open
        if options.get("on_exception") == self.when:
            raise LookupError(f"on_exception of the callback {self.when} the recorder")


class Truth(Callback):
    """Last callback: one line for each finished iteration, in a file of the program's own."""

    def __init__(self, side: Path) -> None:
        self.side = side

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        path = self.side / f"truth-{trainer.global_rank}"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{trainer.global_step}\n".encode())
        os.close(descriptor)


class FailingLogger(CSVLogger):
    """Fails when the failing step is logged."""

    module: Any = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.module.site("logger")
        super().log_metrics(metrics, step)


def make_profiler(config: dict[str, Any], folder: Path) -> Profiler | None:
    kind: str = config["profiler"]
    if kind == "nodir":  # a file is in the way
        (folder.parent / "file").write_text("")
        folder = folder.parent / "file" / "traces"
    stock: dict[str, dict[str, Any]] = {
        "default": {},
        "nodir": {},
        "repeat": {"schedule": schedule(wait=2, warmup=1, active=2, repeat=0)},
        "always": {"schedule": None},
        "waiting": {"schedule": schedule(wait=1 << 20, warmup=1, active=1)},
        "stack": {"with_stack": True},
        "shapes": {"record_shapes": True, "profile_memory": True},
        "ready": {"on_trace_ready": lambda profile: None},
        "plain_folder": {"export_to_chrome": False},
    }
    if kind in stock:
        return PyTorchProfiler(folder, "prof", **stock[kind])
    made: dict[str, Any] = {
        "none": lambda: None,
        "simple": lambda: SimpleProfiler(folder, "prof"),
        "advanced": lambda: AdvancedProfiler(folder, "prof"),
        "window": lambda: WindowProfiler(None, wait=1, warmup=1, active=3),
    }
    return made[kind]()


def make_recorder(config: dict[str, Any], run: Path) -> list[Callback]:
    if not config["recorder"]:
        return []
    options = config["options"]
    dirpath = None if options.get("default_dirpath") else run
    return [FlightRecorder(dirpath, hang_timeout_s=options.get("hang_timeout_s"))]


def make_trainer(config: dict[str, Any], module: Any, profiler: Profiler | None, run: Path) -> Any:
    options, launcher = config["options"], config["launcher"]
    side = Path(config["side"])
    kind = TensorBoardLogger if options.get("tensorboard") else CSVLogger
    logger = (FailingLogger if config["site"] == "logger" else kind)(run, name="", version="")
    if isinstance(logger, FailingLogger):
        logger.module = module
    callbacks: list[Callback] = [Steps(config, when="before"), *make_recorder(config, run)]
    callbacks += [Steps(config, when="after"), Truth(side)]
    if options.get("checkpoint"):
        callbacks.append(
            ModelCheckpoint(
                run / "checkpoints",
                every_n_train_steps=1,
                save_last=True,
                save_on_exception=options["checkpoint"] == "on_exception",
            )
        )
    validates = config["site"] in ("validation_step", "sanity_check") or options.get("validates")
    strategies = {None: "auto", "subprocess": "ddp", "torchrun": "ddp"}
    strategies |= {"spawn": "ddp_spawn", "fork": "ddp_fork"}
    return Trainer(
        accelerator="cpu",
        devices=config["world_size"],
        strategy=strategies[launcher],
        max_steps=config["steps"],
        max_epochs=1,
        logger=logger,
        callbacks=callbacks,
        profiler=profiler,
        log_every_n_steps=1,
        val_check_interval=3 if validates else None,
        limit_val_batches=2 if validates else 0,
        num_sanity_val_steps=2 if config["site"] == "sanity_check" else 0,
        enable_checkpointing=bool(options.get("checkpoint")),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def process_state() -> dict[str, Any]:
    """What a run must leave as it found it. SIGCHLD is torch's own, for loader workers."""
    caught = next(
        int(line.split()[1], 16)
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("SigCgt")
    )
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    handlers = {
        number.name: repr(signal.getsignal(number))
        for number in signal.valid_signals()
        if isinstance(number, signal.Signals) and number != signal.SIGCHLD
    }
    return {
        "caught": caught & ~(1 << (signal.SIGCHLD - 1)),
        "wakeup": wakeup,
        "handlers": handlers,
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


def fit_again(config: dict[str, Any], trainer: Any, profiler: Any, run: Path) -> dict[str, Any]:
    """A healthy run in the process in which one has failed."""
    how = config["options"].get("second", "new_trainer")
    healthy = {**config, "site": None, "side": str(Path(config["side"]) / "second")}
    healthy["options"] = {**config["options"], "on_exception": None, "linger_s": None}
    Path(healthy["side"]).mkdir(exist_ok=True)
    module = (Plain if config["module"] == "plain" else FaultyPPO)(healthy)
    if how == "after_gc":
        gc.collect()
    if how == "same_trainer":
        profiler_then = trainer.profiler
        module.config = {**healthy, "side": config["side"]}
        before = module.trainer_steps if hasattr(module, "trainer_steps") else trainer.global_step
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 3, before + STEPS
    else:
        profiler_then = (
            profiler
            if how == "same_profiler"
            else make_profiler(healthy, run.parent / "second_traces")
        )
        trainer = make_trainer(healthy, module, profiler_then, run.parent / "second_run")
    try:
        trainer.fit(module)
    except BaseException as error:
        return {"finished": False, "error": repr(error)}
    enabled = torch.autograd._profiler_enabled()
    return {"finished": not enabled, "error": "profiler still on" if enabled else None}


def main() -> None:
    config: dict[str, Any] = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    run, side = Path(config["run"]), Path(config["side"])
    profiler = make_profiler(config, run.parent / "traces")
    before = process_state()
    module = (Plain if config["module"] == "plain" else FaultyPPO)(config)
    trainer = make_trainer(config, module, profiler, run)
    if config["options"].get("blocked_run"):  # no place for the run directory
        run.parent.mkdir(exist_ok=True)
        run.write_text("")
    try:
        trainer.fit(module)
    except BaseException as error:
        after = {
            "error": type(error).__name__,
            "notes": getattr(error, "__notes__", []),
            "profiler_on": torch.autograd._profiler_enabled(),
            "before": before,
            "after": process_state(),
        }
        if config["again"]:
            after["again"] = fit_again(config, trainer, profiler, run)
        note(side, f"after-{trainer.global_rank}", after)
        raise


if __name__ == "__main__":
    main()
