"""The command line ``esper``, a file for each subcommand."""

ENDS_WITH = "ESPER_ENDS_WITH"
"""Environment variable with the number of a process: a command gets SIGTERM when that ends."""
