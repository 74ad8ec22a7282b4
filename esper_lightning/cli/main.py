"""``esper``: one command, a subcommand for each thing to do with a run."""
# Little is imported before `main` begins: an interrupt during an import would print a traceback.

import errno
import functools
import importlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple, cast

from esper_lightning.cli import ENDS_WITH

__all__ = ["main"]


class _Command(NamedTuple):
    """A subcommand.

    Attributes:
        does: What it does, for ``esper --help``.
        module: Module below ``esper_lightning.cli`` whose ``run`` takes the words that follow;
            empty for the commands of Lightning's command line.
        builds: Whether its settings may name a user's classes.
        prints: Whether it does nothing but print.
    """

    does: str
    module: str = ""
    builds: bool = False
    prints: bool = False


_COMMANDS = {
    "fit": _Command("train", builds=True),
    "evaluate": _Command("play episodes with the policy of a checkpoint", builds=True),
    "play": _Command("watch the policy of a checkpoint act, in a browser", "play", builds=True),
    "bench": _Command("how fast a task trains here, and what the time goes to", builds=True),
    "export": _Command("write a policy as a file for elsewhere", module="export", builds=True),
    "report": _Command("what a run reached, as text or as a page", module="report", prints=True),
    "crash": _Command("how a run died", module="crash", prints=True),
    "replay": _Command("a dead run again, to its death", module="replay", builds=True),
    "compare": _Command("how variants did over the same seeds", module="compare", prints=True),
    "sweep": _Command("search for settings; the best is judged by further seeds", module="sweep"),
    "list": _Command("configs, environments and policies to name", module="listing", prints=True),
    "doctor": _Command("what this machine has, and what will be fast", module="doctor"),
    "init": _Command("write a small project to begin from", module="init"),
}
_PR_SET_PDEATHSIG = 1
_INTERRUPTED = 1  # Lightning's own exit status after Ctrl-C


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        arguments: Words that follow ``esper``; ``None`` for those of this process.
    """
    words = [*map(_expand_home, sys.argv[1:] if arguments is None else arguments)]
    _end_with(os.environ.pop(ENDS_WITH, ""))
    is_main = threading.current_thread() is threading.main_thread()
    unused = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    owns_signals = arguments is None and is_main and unused
    try:
        stdout = _open_standard_streams()
        if owns_signals:  # an interrupt during an import in C becomes another error
            signal.signal(signal.SIGINT, _leave)
        try:
            execute = _prepare(words)
        except OSError as error:  # of an import, which may need a temporary directory
            from esper_lightning.cli.errors import fail  # noqa: PLC0415

            fail(error)
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
        if _COMMANDS[words[0]].prints:
            sys.exit(1)


def _end_with(parent: str) -> None:
    """Let this process get SIGTERM when the process that started it ends, even by SIGKILL (Linux).

    Args:
        parent: Number of the process that asked for it; empty if none did.
    """
    if not parent or sys.platform != "linux":
        return
    import ctypes  # noqa: PLC0415

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it is gone already, or a program between started this one
        try:
            os.kill(int(parent), 0)
        except ProcessLookupError:
            os._exit(128 + signal.SIGTERM)


def _expand_home(word: str) -> str:
    """A word in which ``~`` is the home folder: shells leave ``--run_dir=~/run`` as it is."""
    name, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
    is_there = value == "~" or value.startswith("~/")
    return name + sign + os.path.expanduser(value) if is_there else word  # noqa: PTH111


def _prepare(words: list[str]) -> Callable[[], None]:
    """Import a command, and check as much as can be checked before the command does anything."""
    name, rest = (words or [""])[0], words[1:]
    command = _COMMANDS.get(name)
    if command is None:
        return functools.partial(_no_command, words)
    if command.builds:
        _find_modules_here()
    if command.module:
        module = importlib.import_module(f"esper_lightning.cli.{command.module}")
        return functools.partial(module.run, rest)
    if name == "fit":
        _leave_with_launcher()
        _reserve_run_directory(rest)
    from esper_lightning.cli.lightning_cli import prepare  # noqa: PLC0415

    try:
        return prepare(words)
    finally:
        if name == "fit":
            _return_reserved()


def _no_command(words: list[str]) -> None:
    """Answer ``esper --help`` and its like, and refuse words that are no command."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    from esper_lightning.cli.errors import fail, nearest  # noqa: PLC0415

    name = words[0] if words else None
    if name in ("-h", "--help"):
        print("usage: esper COMMAND ...\n\nPPO with PyTorch Lightning over batched environments.\n")
        print("\n".join(f"  {name:<10}{command.does}" for name, command in _COMMANDS.items()))
        print("\nesper COMMAND --help describes all that a command takes.")
        print('Words are completed after: eval "$(esper --completion)"  (bash and zsh)')
    elif name == "--version":
        try:
            print(f"esper_lightning {version('esper_lightning')}")
        except PackageNotFoundError:  # run from its source
            print("esper_lightning, not installed")
    elif name == "--completion":
        print(_completion())
    else:
        got = f", got {name!r}." if words else "."
        hint = nearest(name or "", _COMMANDS)
        fail(f"esper must be followed by one of {', '.join(_COMMANDS)}{got}{hint}")


def _completion() -> str:
    """A shell script that completes commands, and names of configs after ``--config``."""
    from esper_lightning.cli import shipped  # noqa: PLC0415

    return f"""\
[ -n "$ZSH_VERSION" ] && autoload -Uz bashcompinit && bashcompinit
_esper() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(_COMMANDS)}" -- "$word"))
    elif [ "$before" = --config ]; then
        COMPREPLY=($(compgen -W "{" ".join(shipped.names())}" -- "$word") $(compgen -f -- "$word"))
    fi
}}
complete -o default -F _esper esper"""


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
