"""Tests. In most of them, compiling would take longer than what is tested: see ``native_code``."""

import os

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # before torch is imported; children inherit it
