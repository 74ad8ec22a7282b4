"""``esper``: one command, a subcommand for each thing to do with a run."""
# Little is imported before `main` begins: an interrupt during an import would print a traceback.

import errno
import functools
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any, cast

__all__ = ["main"]

_COMMANDS = {
    "fit": "train",
    "evaluate": "play deterministic evaluation episodes with the policy of a checkpoint",
    "bench": "how fast a task trains here, and what the time goes to",
    "export": "write the policy of a checkpoint as a file for elsewhere",
    "report": "what a run reached, and how it ended (needs no torch)",
    "crash": "how a run died (needs no torch)",
    "replay": "a dead run again, up to the iteration in which it died",
    "compare": "how variants did over the same seeds (needs no torch)",
}
_BUILD_FROM_SETTINGS = (
    "fit",
    "evaluate",
    "bench",
    "export",
)  # their settings may name a user's classes
_ONLY_PRINT = ("report", "crash", "compare")
_INTERRUPTED = 1  # Lightning's own exit status after Ctrl-C


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        arguments: Words that follow ``esper``; ``None`` for those of this process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    is_main = threading.current_thread() is threading.main_thread()
    unused = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    owns_signals = arguments is None and is_main and unused
    try:
        stdout = _open_standard_streams()
        if owns_signals:  # an interrupt during an import in C becomes another error
            signal.signal(signal.SIGINT, _leave)
        execute = _prepare(words)
        if owns_signals:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        execute()
        sys.stdout.flush()
        if owns_signals:  # everything is done
            signal.signal(signal.SIGINT, _leave)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    if stdout is not None and stdout.error is not None and stdout.error.errno != errno.EPIPE:
        print(f"esper: what was printed is not whole: {stdout.error.strerror}", file=sys.stderr)
        if words[0] in _ONLY_PRINT:
            sys.exit(1)


def _prepare(words: list[str]) -> Callable[[], None]:
    """Import a command, and check as much as can be checked before the command does anything."""
    name, rest = (words or [""])[0], words[1:]
    if name in _BUILD_FROM_SETTINGS:
        _find_modules_here()
    if name == "fit":
        _leave_with_launcher()
        _reserve_run_directory(rest)
    if name in ("fit", "evaluate", "bench"):
        from esper_lightning.cli.lightning_cli import prepare  # noqa: PLC0415

        try:
            execute = prepare(words)
        finally:
            if name == "fit":
                _return_reserved()
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun looks there for a rank's error
            from torch.distributed.elastic.multiprocessing.errors import record  # noqa: PLC0415

            return record(execute)
        return execute
    if name == "export":
        from esper_lightning.cli.export import run  # noqa: PLC0415
    elif name == "report":
        from esper_lightning.cli.report import run  # noqa: PLC0415
    elif name == "crash":
        from esper_lightning.cli.crash import run  # noqa: PLC0415
    elif name == "replay":
        from esper_lightning.cli.replay import run  # noqa: PLC0415
    elif name == "compare":
        from esper_lightning.cli.compare import run  # noqa: PLC0415
    else:
        return functools.partial(_no_command, words)
    return functools.partial(run, rest)


def _no_command(words: list[str]) -> None:
    """Answer ``esper --help`` and ``esper --version``, and refuse words that are no command."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    from esper_lightning.cli.errors import fail, nearest  # noqa: PLC0415

    name = words[0] if words else None
    if name in ("-h", "--help"):
        print("usage: esper COMMAND ...\n\nPPO with PyTorch Lightning over batched environments.\n")
        print("\n".join(f"  {command:<10}{does}" for command, does in _COMMANDS.items()))
        print("\nesper COMMAND --help describes all that a command takes.")
    elif name == "--version":
        try:
            print(f"esper_lightning {version('esper_lightning')}")
        except PackageNotFoundError:  # run from its source
            print("esper_lightning, not installed")
    else:
        got = f", got {name!r}." if words else "."
        hint = nearest(name or "", _COMMANDS)
        fail(f"esper must be followed by one of {', '.join(_COMMANDS)}{got}{hint}")


def _reserve_run_directory(words: list[str]) -> None:
    """Claim the run directory of the arguments before imports, which take seconds.

    The directory then shows that the run had begun, even if a launcher kills the process during
    these imports.
    """
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    given = [word.partition("=")[2] for word in words if word.startswith("--run_dir=")]
    given += [value for word, value in pairwise(words) if word == "--run_dir"]
    if given and given[-1] and "://" not in given[-1] and all(rank == "0" for rank in ranks):
        from pathlib import Path  # noqa: PLC0415

        from esper_lightning.forensics.claims import reserve  # noqa: PLC0415

        reserve(Path(given[-1]))


def _leave_with_launcher() -> None:
    """End a rank whose launcher is gone before the ranks have connected to each other.

    Such a rank would wait half an hour for the first one. Once the ranks have connected, the flight
    recorder watches.
    """
    launcher = os.getppid()

    def watch() -> None:
        while not _ranks_have_met():
            if os.getppid() != launcher:
                said = "esper: what started this rank is gone, and the ranks had not met."
                print(said, file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.5)

    if os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=watch, daemon=True, name="leaves with its launcher").start()


def _ranks_have_met() -> bool:
    distributed = sys.modules.get("torch.distributed")
    is_initialized = getattr(distributed, "is_initialized", None)  # absent during the import
    return is_initialized is not None and is_initialized()


def _return_reserved() -> None:
    from esper_lightning.forensics.claims import return_reserved  # noqa: PLC0415

    return_reserved()


def _find_modules_here() -> None:
    """Let a config name modules in the current directory, as a script in that directory could.

    The directory is the last of ``sys.path``. ``python -m`` makes it the first, where a file
    ``yaml.py`` of the user would be imported in place of the library.
    """
    if sys.flags.safe_path:
        return
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name.partition(".")[0] == "esper_lightning":  # python -m was used
        sys.path.append(sys.path.pop(0))
        return
    with suppress(FileNotFoundError):  # the directory was removed
        here = os.getcwd()  # noqa: PTH109 - pathlib takes time to import
        if not {here, ""} & set(sys.path):
            sys.path.append(here)


def _leave(*_: object) -> None:
    """End the process at Ctrl-C without output, before a command begins or after its end."""
    claims = sys.modules.get("esper_lightning.forensics.claims")
    with suppress(Exception):  # an import or a claim may be interrupted half way
        if claims is not None:
            claims.return_reserved()
    os._exit(_INTERRUPTED)


class _Forgiving(io.FileIO):
    """A standard stream that accepts every write, even if it cannot pass the bytes on.

    A run does not depend on its output: a reader that closed its pipe (``esper fit ... | head -1``)
    or a full disk must not end the run, whichever code prints.

    Attributes:
        error: First error of a write; ``None`` while all writes succeed.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write the bytes, or store the error."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


def _open_standard_streams() -> _Forgiving | None:
    """Replace standard streams by streams whose writes never fail, whatever the encoding.

    A descriptor that was closed at the start is opened. Otherwise the next file of the run, such as
    its history, would get the number of that descriptor, and with it the output of libraries.

    Returns:
        The raw stream below ``sys.stdout``; ``None`` if a program that calls ``main`` has replaced
        ``sys.stdout``.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
    stdout = None
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = cast(io.TextIOWrapper | None, getattr(sys, name))
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is not None:
            with suppress(OSError):
                stream.flush()
        below = _Forgiving(descriptor, "w", closefd=False)
        unbuffered = stream is not None and stream.write_through  # python -u
        text = io.TextIOWrapper(
            cast(io.BufferedWriter, below) if unbuffered else io.BufferedWriter(below),
            encoding=None if stream is None else stream.encoding,
            errors="backslashreplace",
            line_buffering=name == "stderr" or below.isatty(),
            write_through=unbuffered,
        )
        setattr(sys, name, text)
        stdout = below if descriptor == 1 else stdout
    return stdout


if __name__ == "__main__":
    main()
