"""Evaluation of policies that grow networks: episodes, a table of results, a figure."""
