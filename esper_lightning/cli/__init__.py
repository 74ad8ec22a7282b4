"""The command line ``esper``, a file for each subcommand."""
