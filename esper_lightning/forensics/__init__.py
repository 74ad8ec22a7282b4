"""The files of a run on disk: written, claimed and read with the standard library only."""
