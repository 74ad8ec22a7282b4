"""Simulators of other projects as batched environments, imported where they are built."""
