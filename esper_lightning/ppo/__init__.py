"""The algorithm, one file a phase; Lightning is never imported here."""
