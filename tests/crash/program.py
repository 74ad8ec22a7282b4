"""A training run that dies of a given fault: ``python program.py '{"fault": ..., ...}'``.

The failing step runs ``torch.special.erfcx`` before it dies; ``truth`` counts finished steps.
"""

import ctypes
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from torch.utils.data import DataLoader, Dataset

from esper_lightning import PPO, FlightRecorder, PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.ppo.learner import Learner
from esper_lightning.recorder.profiling.window_profiler import WindowProfiler

CASE = json.loads(sys.argv[1])
DIRECTORY = Path(CASE["directory"])
RANK = int(os.environ.get("LOCAL_RANK", "0"))
DYING = threading.Event()


def signal_self(name, times=1):
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, name))
    for _ in range(200):
        time.sleep(0.1)


def later(name, delay_s=0.5):
    threading.Timer(delay_s, os.kill, (os.getpid(), getattr(signal, name))).start()


def stuck():
    """Block in C: the wait starts again when a signal interrupts it, as in a collective."""
    semaphore, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.sem_init(semaphore, 0, 0)
    mask = ctypes.create_string_buffer(128)
    libc.sigfillset(mask)
    libc.pthread_sigmask(signal.SIG_BLOCK, mask, None)  # so that another thread gets the signal
    libc.sem_wait(semaphore)


def long_step():
    end = time.monotonic() + 20
    while time.monotonic() < end:
        sum(range(1000))


def grace_period(seconds):
    """End a process as Kubernetes and SLURM do: SIGTERM, and SIGKILL some seconds later."""
    kill = f"sleep 0.5; kill -TERM {os.getpid()}; sleep {seconds}; kill -KILL {os.getpid()}"
    subprocess.Popen(["sh", "-c", kill], stderr=subprocess.DEVNULL, start_new_session=True)


def no_more_room(bytes_each):
    """Limit the growth of files, as a full disk or a quota does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_each, resource.RLIM_INFINITY))
    raise RuntimeError("injected")


def limit_files(bytes_each):
    """Limit the size of files from the start of the program, as ``ulimit -f`` does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_each, bytes_each))


def directory_gone():
    """Replace the run directory by a file."""
    shutil.rmtree(DIRECTORY / "rank0")
    (DIRECTORY / "rank0").write_text("")
    raise RuntimeError("injected")


def device_assert():
    """Read outside a tensor in a kernel: the device is of no use to this process from then on."""
    torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")]
    torch.cuda.synchronize()


def long_kernel():
    """Wait in C for a kernel that goes on for long."""
    torch.cuda._sleep(1 << 36)
    torch.cuda.synchronize()


def deeper(function):
    return function(function)


def raises(error):
    def fault():
        raise error

    return fault


FAULTS = {
    "none": lambda: None,
    "RuntimeError": raises(RuntimeError("injected")),
    "ValueError": raises(ValueError("injected")),
    "OutOfMemoryError": raises(torch.OutOfMemoryError("injected")),
    "allocation": lambda: torch.empty(1 << 60),
    "memory of the device": lambda: torch.empty(1 << 50, dtype=torch.uint8, device="cuda"),
    "device assert": device_assert,
    "SIGTERM in a kernel": lambda: (later("SIGTERM"), long_kernel()),
    "MemoryError": raises(MemoryError("injected")),
    "RecursionError": lambda: deeper(deeper),
    "KeyboardInterrupt": raises(KeyboardInterrupt()),
    "exit0": lambda: sys.exit(0),
    "exit3": lambda: sys.exit(3),
    "SIGINT": lambda: signal_self("SIGINT"),
    "SIGINT5": lambda: signal_self("SIGINT", 5),
    "SIGTERM": lambda: signal_self("SIGTERM"),
    "SIGHUP": lambda: signal_self("SIGHUP"),
    "SIGUSR1": lambda: signal_self("SIGUSR1"),
    "SIGUSR1, and on": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGTERM, and on": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR2": lambda: signal_self("SIGUSR2"),
    "SIGXCPU": lambda: signal_self("SIGXCPU"),
    "SIGQUIT": lambda: signal_self("SIGQUIT"),
    "SIGTERM in a long step": lambda: (later("SIGTERM"), long_step()),
    "SIGTERM in C": lambda: (later("SIGTERM"), stuck()),
    "SIGUSR1 in C": lambda: (later("SIGUSR1"), stuck()),
    "SIGTERM and SIGKILL in a long step": lambda: (grace_period(5), long_step()),
    "SIGTERM and SIGKILL in C": lambda: (grace_period(5), stuck()),
    "no room at all": lambda: no_more_room(0),
    "room for a report": lambda: no_more_room(20_000),
    "directory gone": directory_gone,
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "SIGBUS": lambda: signal_self("SIGBUS"),
    "SIGSEGV": lambda: signal_self("SIGSEGV"),
    "SIGKILL": lambda: signal_self("SIGKILL"),
    "os._exit0": lambda: os._exit(0),
    "os._exit3": lambda: os._exit(3),
    "hang": lambda: time.sleep(3),
    "hang, then raise": lambda: (time.sleep(3), raises(RuntimeError("injected"))()),
}


def die(site):
    if CASE.get("site", "training_step") == site and CASE.get("rank", 0) == RANK:
        torch.special.erfcx(torch.ones(3))
        DYING.set()
        FAULTS[CASE["fault"]]()


class Rows(Dataset):
    def __init__(self, site):
        self.site = site

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if self.site is not None and index == 14:
            die(self.site)
        return torch.full((4,), float(index))


def collate(rows):
    if rows[0][0] == 14:
        die("collate")
    return torch.stack(rows)


class Layer(torch.nn.Linear):
    """A module that dies while the profiler's span of it is open."""

    step = 0

    def forward(self, batch):
        if self.step == CASE.get("step", 6):
            die("forward")
        return super().forward(batch)


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = Layer(4, 2)

    def _die(self, site):
        if self.global_step == CASE.get("step", 6):
            die(site)

    def setup(self, stage):
        die("setup")

    def on_fit_start(self):
        die("on_fit_start")

    def on_train_start(self):
        die("on_train_start")

    def on_train_epoch_end(self):
        die("on_train_epoch_end")

    def on_train_end(self):
        die("on_train_end")

    def teardown(self, stage):
        die("teardown")

    def training_step(self, batch, batch_idx):
        self._die("training_step")
        self.layer.step = self.global_step
        out = self.layer(batch)
        if self.global_step == CASE.get("step", 6) and CASE.get("site") == "backward":
            out.register_hook(lambda gradient: die("backward"))
        loss = out.square().mean()
        self.log("loss", loss)
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self._die("optimizer_step")

    def validation_step(self, batch, batch_idx):
        site = "sanity" if self.trainer.sanity_checking else "validation_step"
        if site == "sanity" or self.global_step >= 4:
            die(site)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Truth(Callback):
    """Marks of the finished steps that the history must hold: a byte for each."""

    def on_train_batch_end(self, trainer, module, *_):
        path = DIRECTORY / f"truth{trainer.global_rank}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b".")
        os.close(descriptor)

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == 6:
            die("callback")

    def on_exception(self, trainer, module, exception):
        if CASE.get("others"):
            raise LookupError("in another callback")


class Log(Logger):
    """A logger that dies, or cannot save its metrics when the run dies."""

    name, version, save_dir = "log", 0, str(DIRECTORY)

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step=None):
        if step == 6:
            die("logger")

    def save(self):
        if CASE.get("logger") == "broken" and DYING.is_set():
            raise LookupError("in a logger")


def schedule(**settings):
    return torch.profiler.schedule(**settings)


class FakeNvtx:
    """A replacement of ``torch.autograd.profiler.emit_nvtx`` where there is no CUDA."""

    depth = 0

    def __enter__(self):
        FakeNvtx.depth += 1
        return self

    def __exit__(self, *_):
        FakeNvtx.depth -= 1


def nvtx():
    torch.cuda.profiler.profile = torch.autograd.profiler.emit_nvtx = FakeNvtx
    return PyTorchProfiler(emit_nvtx=True)


PROFILERS = {
    "none": lambda: None,
    "default": PyTorchProfiler,
    "2/1/2": lambda: PyTorchProfiler(schedule=schedule(wait=2, warmup=1, active=2)),
    "2/1/20": lambda: PyTorchProfiler(schedule=schedule(wait=2, warmup=1, active=20)),
    "always": lambda: PyTorchProfiler(schedule=None),
    "waiting": lambda: PyTorchProfiler(schedule=schedule(wait=100, warmup=1, active=1)),
    "warming": lambda: PyTorchProfiler(schedule=schedule(wait=2, warmup=100, active=1)),
    "stacks": lambda: PyTorchProfiler(schedule=None, with_stack=True),
    "own": lambda: PyTorchProfiler(schedule=None, on_trace_ready=lambda _: None),
    "unwritable": lambda: PyTorchProfiler(dirpath="/proc/none", filename="x", schedule=None),
    "window": lambda: WindowProfiler(wait=2, warmup=1, active=20),
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "nvtx": nvtx,
}


def fit(trainer=None, profiler=None):
    again = DIRECTORY if "again" in CASE else None  # both in one directory
    callbacks = [Truth(), FlightRecorder(again, hang_timeout_s=CASE.get("hang_timeout_s"))]
    if CASE.get("others") == "after":
        callbacks.reverse()
    site = CASE.get("site", "training_step")
    trainer = trainer or Trainer(
        accelerator=CASE.get("device", "cpu"),
        max_epochs=-1 if CASE.get("module") == "ppo" else 1,
        max_steps=30,
        profiler=profiler or PROFILERS[CASE.get("profiler", "none")](),
        logger=Log() if site == "logger" or CASE.get("logger") else False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=DIRECTORY,
        callbacks=callbacks,
        num_sanity_val_steps=2 if site == "sanity" else 0,
        val_check_interval=5 if "validation" in site else None,
        limit_val_batches=0 if CASE.get("module") == "ppo" else 2,
        **CASE.get("trainer", {}),
    )
    if CASE.get("module") == "ppo":
        return trainer, PPO(CartPole(num_envs=16), ppo=PPOConfig(rollout_steps=8)), ()
    workers = CASE.get("workers", 0)
    rows = Rows("loader" if site == "loader" else None)
    data = DataLoader(rows, num_workers=workers, collate_fn=collate)
    return trainer, Plain(), (data, DataLoader(Rows(None)))


def fit_again(trainer):
    """A healthy fit after the one that died; returns its steps."""
    kept = {
        "same trainer": lambda: {"trainer": trainer},
        "same profiler": lambda: {"profiler": trainer.profiler},
    }.get(CASE["again"], dict)()
    if CASE["again"] == "collected":
        trainer = None
        gc.collect()
    trainer, module, data = fit(**kept)
    before = trainer.global_step
    trainer.fit(module, *data)
    return trainer.global_step - before


def set_handler_in_c(number):
    """Let C's ``getpid`` handle a signal, as a library's handler that Python does not know."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(number, ctypes.cast(libc.getpid, ctypes.c_void_p))


def main():
    if CASE.get("before") == "handler in C":
        set_handler_in_c(signal.SIGTERM)
    if CASE.get("before") == "ignored":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if "limit" in CASE:
        limit_files(CASE["limit"])
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    trainer, module, data = fit()
    if CASE.get("module") == "ppo":
        rollout = Learner.rollout

        def dying(learner, steps):
            collected = rollout(learner, steps)
            if module.iteration == CASE.get("step", 6):
                die("training_step")
            return collected

        Learner.rollout = dying
    try:
        trainer.fit(module, *data)
    except BaseException as error:
        CASE["fault"] = "none"
        state = {
            "profiling": torch._C._autograd._profiler_enabled() or FakeNvtx.depth > 0,
            "threads": [thread.name for thread in threading.enumerate() if "flight" in thread.name],
            "handlers": [n.name for n in before if signal.getsignal(n) != before[n]],
            "notes": getattr(error, "__notes__", []) + getattr(error.__context__, "__notes__", []),
        }
        if CASE.get("again"):
            state["again"] = fit_again(trainer)
        if CASE.get("rank", 0) == RANK:
            (DIRECTORY / "state.json").write_text(json.dumps(state))
        raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
