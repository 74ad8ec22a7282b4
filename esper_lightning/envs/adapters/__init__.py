"""Simulators of others as batched environments, each imported where it is built."""
