"""Where configs of version 0.1 look for ``WindowProfiler``."""

from esper_lightning.recorder.profiling.window_profiler import WindowProfiler

__all__ = ["WindowProfiler"]
