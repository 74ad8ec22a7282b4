"""``esper``: one command, a subcommand for each thing to do with a run."""

import contextlib
import io
import os
import sys

from esper_lightning.cli import compare, crash, report

__all__ = ["main"]

# A login node may have none.
_WITHOUT_TORCH = {"compare": compare.run, "crash": crash.run, "report": report.run}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        arguments: What follows ``esper``; ``None`` for the process's own.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in _WITHOUT_TORCH:
        for stream in (sys.stdout, sys.stderr):  # an ASCII terminal gets é as \xe9
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with contextlib.suppress(BrokenPipeError):  # esper crash ... | head
            _WITHOUT_TORCH[words[0]](words[1:])
            sys.stdout.flush()
            return
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor at exit
        return
    if words[:1] == ["export"]:
        from esper_lightning.cli import export  # noqa: PLC0415

        export.run(words[1:])
        return
    from esper_lightning.cli.lightning_cli import run  # noqa: PLC0415

    run(words)


if __name__ == "__main__":
    main()
