"""``python -m esper_lightning`` is ``esper``."""

from esper_lightning.cli.main import main

if __name__ == "__main__":
    main()
