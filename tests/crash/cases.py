"""The faults, and the files that each must leave: data for the tests and the results file."""

from typing import Any, NamedTuple

Case = dict[str, Any]


class Expected(NamedTuple):
    """Exit status, the report's cause, its error's type, and whether the failing step is traced."""

    status: int
    cause: str
    error: str | None
    trace: bool


_RAISED = {
    "RuntimeError": (1, "exception", "RuntimeError"),
    "ValueError": (1, "exception", "ValueError"),
    "OutOfMemoryError": (1, "exception", "OutOfMemoryError"),
    "allocation": (1, "exception", "RuntimeError"),
    "MemoryError": (1, "exception", "MemoryError"),
    "RecursionError": (1, "exception", "RecursionError"),
    "KeyboardInterrupt": (1, "signal", "KeyboardInterrupt"),
    "exit0": (0, "exception", "SystemExit"),
    "exit3": (3, "exception", "SystemExit"),
    "SIGINT": (1, "signal", "KeyboardInterrupt"),
    "SIGINT5": (1, "signal", "KeyboardInterrupt"),
    "SIGTERM": (143, "signal", "SIGTERMException"),
    "SIGHUP": (129, "signal", "SignalExit"),
    "SIGUSR1": (138, "signal", "SignalExit"),
    "SIGUSR2": (140, "signal", "SignalExit"),
    "SIGXCPU": (152, "signal", "SignalExit"),
    "SIGQUIT": (131, "signal", "SignalExit"),
    "SIGTERM in a long step": (143, "signal", "SIGTERMException"),
    "SIGTERM in C": (143, "signal", None),
    "SIGUSR1 in C": (138, "signal", None),
    "abort": (-6, "native", None),
    "segfault": (-11, "native", None),
    "SIGBUS": (-7, "native", None),
    "SIGSEGV": (-11, "native", None),
}
_SPECIAL = {
    "device assert": (1, "exception", "AcceleratorError"),
    "memory of the device": (1, "exception", "OutOfMemoryError"),
    "SIGTERM in a kernel": (143, "signal", None),
    "SIGTERM and SIGKILL in a long step": (143, "signal", "SIGTERMException"),
    "SIGTERM and SIGKILL in C": (143, "signal", None),
    "room for a report": (1, "exception", "RuntimeError"),
}
_VANISHED = {"SIGKILL": -9, "os._exit0": 0, "os._exit3": 3}
_OPEN_WINDOW = ("2/1/20", "always", "stacks", "own", "window", "unwritable")
_RECORDED = {"default": range(2, 5), "2/1/2": range(3, 5)}  # steps, of the one window there is
_SITES = (
    "callback",
    "forward",
    "backward",
    "optimizer_step",
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_end",
    "on_train_end",
    "teardown",
    "validation_step",
    "sanity",
    "loader",
    "collate",
)


def expected(case: Case) -> Expected:
    """The files that a case must leave."""
    fault, profiler = case["fault"], case.get("profiler", "none")
    if case.get("workers") and fault != "none":  # a worker's operators are not in the window
        return Expected(1, "exception", "RuntimeError", trace=False)
    if fault in _VANISHED:
        return Expected(_VANISHED[fault], "vanished", None, trace=False)
    status = (_RAISED | _SPECIAL)[fault]
    if case.get("others"):  # theirs is raised in place of the run's error
        status = (1, *status[1:])
    recorded = profiler in _OPEN_WINDOW or case.get("step", 6) in _RECORDED.get(profiler, ())
    return Expected(*status, trace=recorded)


def has_open_window(case: Case) -> bool:
    """Whether something is being recorded at the death, if not what the failing process does."""
    return case.get("profiler") in _OPEN_WINDOW


def has_closed_window(case: Case) -> bool:
    """Whether the profiler's window has closed before the death."""
    window = _RECORDED.get(case.get("profiler", "none"))
    return window is not None and case.get("step", 6) >= window.stop


def name(case: Case) -> str:
    """For the test's id."""
    return "-".join(str(v) for k, v in case.items() if k != "trainer").replace(" ", "_")


AGAIN = ("new", "same trainer", "same profiler", "collected")

QUICK: list[Case] = [
    *({"fault": f, "profiler": "2/1/20"} for f in (*_RAISED, *_VANISHED)),
    *({"fault": "RuntimeError", "profiler": p} for p in ("none", "waiting", "warming", "always")),
    *({"fault": "RuntimeError", "profiler": p} for p in ("window", "simple", "advanced")),
    *({"fault": f, "profiler": "window", "module": "ppo"} for f in ("RuntimeError", "SIGINT")),
    {"fault": "RuntimeError", "profiler": "default", "step": 3},
    {"fault": "SIGINT", "profiler": "default", "step": 10},
    {"fault": "RuntimeError", "profiler": "always", "site": "forward"},
    {"fault": "RuntimeError", "profiler": "unwritable"},
    *({"fault": "RuntimeError", "profiler": "always", "again": a} for a in AGAIN),
    *({"fault": "RuntimeError", "profiler": "always", "others": o} for o in ("before", "after")),
    {"fault": "SIGTERM and SIGKILL in C", "profiler": "always"},
    {"fault": "room for a report", "profiler": "always"},
    *({"fault": f, "profiler": "always", "limit": 100_000} for f in ("RuntimeError", "SIGKILL")),
    {"fault": "SIGKILL", "profiler": "none", "site": "loader", "workers": 2},
    {"fault": "RuntimeError", "profiler": "always", "site": "on_train_start"},
    {"fault": "RuntimeError", "profiler": "always", "site": "validation_step"},
]

_MORE_FAULTS = ("RuntimeError", "KeyboardInterrupt", "SIGTERM", "segfault", "SIGKILL")

ALL: list[Case] = [
    *QUICK,
    *({"fault": f, "profiler": "none"} for f in _RAISED if f != "RuntimeError"),
    *({"fault": f, "profiler": "window"} for f in _RAISED if f != "RuntimeError"),
    *(
        {"fault": "RuntimeError", "profiler": p, "site": s}
        for s in _SITES
        for p in ("always", "none")
        if {"fault": "RuntimeError", "profiler": p, "site": s} not in QUICK
    ),
    *(
        {"fault": "RuntimeError", "profiler": p, "step": s}
        for p in _RECORDED
        for s in (1, 2, 3, 4, 10)
        if (p, s) != ("default", 3)
    ),
    *(
        {"fault": f, "profiler": p, "step": s}
        for f in _MORE_FAULTS[1:]
        for p in _RECORDED
        for s in (3, 10)
    ),
    *(
        {"fault": f, "profiler": "default", "step": s, "module": "ppo"}
        for f in ("RuntimeError", "SIGINT", "SIGKILL")
        for s in (3, 10)
    ),
    *({"fault": "RuntimeError", "profiler": p, "site": "forward"} for p in ("2/1/20", "simple")),
    {"fault": "RuntimeError", "profiler": "default", "site": "forward", "step": 3},
    {"fault": "KeyboardInterrupt", "profiler": "always", "site": "forward"},
    *({"fault": f, "profiler": "always", "logger": "broken"} for f in ("RuntimeError", "SIGTERM")),
    *({"fault": f, "profiler": "2/1/20", "site": "loader"} for f in ("SIGINT", "MemoryError")),
    *({"fault": f, "profiler": "default", "site": "collate"} for f in ("SIGTERM", "exit3")),
    *(
        {"fault": "RuntimeError", "profiler": p, "site": s, "workers": 2}
        for p in ("always", "default")
        for s in ("loader", "collate")
    ),
    *(
        {"fault": f, "profiler": "none", "site": "loader", "workers": 2}
        for f in ("RuntimeError", "SIGTERM", "segfault", "os._exit3")
    ),
    {"fault": "SIGKILL", "profiler": "always", "site": "loader", "workers": 2},
    {"fault": "SIGTERM and SIGKILL in a long step", "profiler": "always"},
    {"fault": "room for a report", "profiler": "none"},
    *(
        {"fault": f, "profiler": p, "limit": b}
        for f in ("RuntimeError", "SIGTERM", "segfault")
        for p in ("always", "window")
        for b in (20_000, 300_000)
    ),
    *({"fault": "RuntimeError", "profiler": "nvtx", "module": m} for m in ("plain", "ppo")),
    {"fault": "SIGINT", "profiler": "nvtx"},
    *({"fault": "SIGTERM", "profiler": p, "others": "before"} for p in ("none", "2/1/20")),
    *({"fault": f, "profiler": p} for f in _MORE_FAULTS[1:] for p in ("simple", "advanced")),
    *({"fault": f, "profiler": p} for f in _MORE_FAULTS for p in ("own", "stacks")),
    *({"fault": f, "profiler": p} for f in _MORE_FAULTS[1:] for p in ("waiting", "warming")),
    *(
        {"fault": f, "profiler": p, "module": "ppo"}
        for f in (*_MORE_FAULTS, "SIGHUP", "abort", "MemoryError")
        for p in ("none", "2/1/20", "window")
        if (f, p) != ("RuntimeError", "window")
    ),
]


_OF_GPUS = ("device assert", "memory of the device", "SIGTERM in a kernel")

ON_GPU: list[Case] = [
    *(
        {"fault": f, "profiler": p, "device": "gpu"}
        for f in (*_OF_GPUS, "RuntimeError", "SIGINT", "abort", "segfault", "SIGKILL")
        for p in ("none", "2/1/20", "window")
    ),
    *({"fault": f, "profiler": "window", "module": "ppo", "device": "gpu"} for f in _OF_GPUS),
]


class RankCase(NamedTuple):
    """A fault in one of two ranks."""

    fault: str  # one of those in ranks.py
    strategy: str  # of Lightning, or torchrun
    rank: int


def name_ranks(case: RankCase) -> str:
    """For the test's id."""
    return "-".join(map(str, case))


_STRATEGIES = ("ddp", "torchrun", "ddp_spawn", "ddp_fork")

QUICK_RANKS = [
    RankCase("raises", "ddp", 1),
    RankCase("killed", "ddp", 1),
    RankCase("raises", "torchrun", 1),
]
ALL_RANKS = [
    *(RankCase(f, s, 1) for f in ("raises", "killed", "terminated", "hangs") for s in _STRATEGIES),
    *(RankCase(f, s, 0) for f in ("raises", "killed") for s in _STRATEGIES),
]
