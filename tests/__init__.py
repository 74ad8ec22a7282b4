"""Tests. In most of them, compiling would take longer than what is tested: see ``native_code``."""

import os

# Before torch is imported; children inherit it.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
