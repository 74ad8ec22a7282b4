"""Callbacks: history and progress."""
