"""Processes that several runs, signals and threads share.

Called with the name of a function of this file, and its arguments as JSON.
"""

import asyncio
import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PyTorchProfiler
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder

HERE = Path()


class Plain(LightningModule):
    """A module that calls ``act(batch_idx)`` in every step."""

    def __init__(self, act):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.act = act

    def training_step(self, batch, batch_idx):
        torch.special.erfcx(batch)
        self.act(batch_idx)
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(name, act, *, rows=8, callbacks=(), profiler=None, **recorder):
    """A recorded fit in the directory ``name``."""
    recorder = FlightRecorder(HERE / name, print_profile=False, **recorder)
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        profiler=profiler,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=HERE / name,
        callbacks=[*callbacks, recorder],
    ).fit(Plain(act), DataLoader(torch.ones(rows, 4)))


def at(step, action):
    return lambda batch_idx: action() if batch_idx == step else None


def kill_self(number):
    os.kill(os.getpid(), number)
    time.sleep(20)


def raise_in_c(number):
    getattr(ctypes.CDLL(None), "raise")(number)


def segfault():
    ctypes.string_at(0)


def later(number, delay_s):
    """Another process sends the signal."""
    command = f"sleep {delay_s}; kill -{number} {os.getpid()}"
    subprocess.Popen(["sh", "-c", command])


def mark(name):
    (HERE / name).write_text("")


def wait_for(*names):
    end = time.monotonic() + 20
    while not all((HERE / name).exists() for name in names):
        assert time.monotonic() < end, names
        time.sleep(0.01)


def in_thread(function, *args, daemon=False, **kwargs):
    thread = threading.Thread(target=function, args=args, kwargs=kwargs, daemon=daemon)
    thread.start()
    return thread


# One run, and a signal.


def sent(number):
    fit("run", at(3, lambda: kill_self(number)), profiler=PyTorchProfiler(schedule=None))


def sent_and_on(number):
    fit("run", at(3, lambda: os.kill(os.getpid(), number)))


def raised_by_c(number):
    fit("run", at(3, lambda: raise_in_c(number)), profiler=PyTorchProfiler(schedule=None))


def handled_by_the_user(number):
    signal.signal(number, lambda *_: mark("handled"))
    fit("run", at(3, lambda: os.kill(os.getpid(), number)))


def ignored_by_the_user(number):
    signal.signal(number, signal.SIG_IGN)
    fit("run", at(3, lambda: os.kill(os.getpid(), number)))


def dumped_by_faulthandler(number):
    with (HERE / "dumped").open("w") as file:
        faulthandler.register(number, file=file)
        fit("run", at(3, lambda: os.kill(os.getpid(), number)))


def again_while_unwinding(number, cleanup_s):
    """Five more of the signal arrive while the first one's exception is on its way."""

    def act():
        try:
            kill_self(number)
        finally:
            for _ in range(5):
                time.sleep(cleanup_s / 5)
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            mark("cleaned up")

    fit("run", at(3, act))


def again_while_lightning_shuts_down(number):
    class Slow(Callback):
        def on_exception(self, trainer, module, exception):
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            mark("shut down")

    before = signal.getsignal(number)
    try:
        fit("run", at(3, lambda: kill_self(number)), callbacks=[Slow()])
    finally:
        if signal.getsignal(number) == before:
            mark("as before")


def caught_and_again(number):
    """Each of two signals ends what it arrives in; the second one's exception is not caught."""

    def act():
        with contextlib.suppress(BaseException):
            kill_self(number)
        mark("caught")
        kill_self(number)

    fit("run", at(3, act))


def forks(number):
    """A child of the run dies of the signal as if nothing had been recorded."""

    def act():
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), number)
            time.sleep(20)
            os._exit(77)
        status = os.waitpid(pid, 0)[1]
        (HERE / "child").write_text(str(os.waitstatus_to_exitcode(status)))

    in_thread(fit, "run", at(3, act)).join()
    fit("run", at(3, act))


# Several runs.


def overlapping(first, last, fault):
    """Run A begins before run B and ends before it; then B dies."""

    def act_of_a(batch_idx):
        if batch_idx == 3:
            wait_for("b runs")

    def act_of_b(batch_idx):
        if batch_idx == 3:
            mark("b runs")
            wait_for("a ended")
            segfault() if fault == "segfault" else kill_self(fault)

    def a():
        fit("a", act_of_a)
        mark("a ended")

    def b():
        wait_for("a/rank0/history.jsonl")
        fit("b", act_of_b)

    threads = [in_thread(run) for run, where in ((a, first), (b, last)) if where == "thread"]
    for run, where in ((a, first), (b, last)):
        if where == "main":
            run()
    for thread in threads:
        thread.join()


def together(where, number):
    """Two runs live; the signal ends both."""

    def act_of(name):
        def act(batch_idx):
            mark(f"{name} {batch_idx}")
            time.sleep(0.05)
            if batch_idx == 3 and name == "b":
                wait_for("a 3")
                segfault() if number == "segfault" else os.kill(os.getpid(), number)

        return act

    threads = [in_thread(fit, "b", act_of("b"), rows=500)]
    if where == "thread":
        threads.append(in_thread(fit, "a", act_of("a"), rows=500))
    else:
        fit("a", act_of("a"), rows=500)
    for thread in threads:
        thread.join()


def in_an_executor(number):
    """The main thread runs an asyncio loop that has handlers of its own."""

    async def main():
        loop = asyncio.get_running_loop()
        handled = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, handled.set)
        act = at(3, lambda: (os.kill(os.getpid(), signal.SIGUSR1), wait_for("handled")))
        run = loop.run_in_executor(None, fit, "a", act)
        await asyncio.wait_for(handled.wait(), 20)
        mark("handled")
        await run
        handled.clear()
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(handled.wait(), 20)
        mark("handled afterwards")
        # A handler that is set while a fit runs takes the wakeup descriptor for itself.
        begun = asyncio.Event()
        act = at(3, lambda: (loop.call_soon_threadsafe(begun.set), time.sleep(20)))
        loop.run_in_executor(None, fit, "b", act)
        await begun.wait()
        loop.add_signal_handler(signal.SIGUSR2, lambda: None)
        os.kill(os.getpid(), number)
        await asyncio.sleep(20)

    asyncio.run(main())


def interrupted_beside(name):
    """Ctrl-C interrupts the main thread, which does something else."""
    run = in_thread(fit, name, at(3, lambda: wait_for("interrupted")))
    wait_for(f"{name}/rank0/history.jsonl")
    try:
        kill_self(signal.SIGINT)
    except KeyboardInterrupt:
        mark("interrupted")
    run.join()


def exits_beside_a_daemon(name):
    """The main thread leaves; the run in a daemon thread dies with the interpreter."""
    in_thread(fit, name, at(3, lambda: (mark("three"), time.sleep(20))), daemon=True)
    wait_for("three")


def within(number):
    """A fit in a callback of another fit."""

    class Inner(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 3:
                fit("inner", at(3, lambda: kill_self(number)))

    fit("outer", lambda _: None, callbacks=[Inner()])


def beside_an_unrecorded_trainer(fault):
    """Lightning restores all signals that it found, at the end of a run."""

    def act():
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Plain(lambda _: None), DataLoader(torch.ones(2, 4)))
        time.sleep(1.5)
        segfault() if fault == "segfault" else kill_self(fault)

    fit("run", at(3, act))


def raises_in_another_thread(name):
    def fails():
        raise RuntimeError("in another thread")

    fit(name, at(3, lambda: in_thread(fails).join()))


# Time.


def suspended(seconds):
    """Suspend the process for longer than an iteration may take."""

    def act():
        command = f"kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", command])
        time.sleep(0.3)

    fit("run", lambda batch_idx: act() if batch_idx in (3, 5) else None, hang_timeout_s=1.0)


def suspended_after_a_signal(seconds):
    """The grace period for a reaction of the main thread has hardly begun."""

    def act():
        try:
            command = f"kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}"
            later("TERM", 0.2)
            time.sleep(20)
        finally:
            subprocess.Popen(["sh", "-c", command])
            time.sleep(1.0)
            mark("cleaned up")

    fit("run", at(3, act))


if __name__ == "__main__":
    globals()[sys.argv[1]](*json.loads(sys.argv[2]))
