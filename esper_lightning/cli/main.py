"""``esper``: one command, a subcommand for each thing to do with a run."""

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        arguments: What follows ``esper``; ``None`` for the process's own.
    """
    from esper_lightning.cli.lightning_cli import run  # noqa: PLC0415 - torch is not needed to print a usage error

    run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
