"""The faults, and what each of them is to leave: data for the tests and the results file."""

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
    "SIGTERM and SIGKILL in a long step": (143, "signal", "SIGTERMException"),
    "SIGTERM and SIGKILL in C": (143, "signal", None),
    "room for a report": (1, "exception", "RuntimeError"),
}
_VANISHED = {"SIGKILL": -9, "os._exit0": 0, "os._exit3": 3}
_OPEN_WINDOW = ("2/1/20", "always", "stacks", "own", "window", "unwritable")
_SITES = (
    "callback",
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
)


def expected(case: Case) -> Expected:
    """What a case is to leave."""
    fault, profiler = case["fault"], case.get("profiler", "none")
    if case.get("workers") and fault != "none":  # a worker's operators are not in the window
        return Expected(1, "exception", "RuntimeError", trace=False)
    if fault in _VANISHED:
        return Expected(_VANISHED[fault], "vanished", None, trace=False)
    status = (_RAISED | _SPECIAL)[fault]
    if case.get("others"):  # theirs is raised in place of the run's error
        status = (1, *status[1:])
    return Expected(*status, trace=profiler in _OPEN_WINDOW and "room" not in fault)


def name(case: Case) -> str:
    """For the test's id."""
    return "-".join(str(v) for k, v in case.items() if k != "trainer").replace(" ", "_")


AGAIN = ("new", "same trainer", "same profiler", "collected")

QUICK: list[Case] = [
    *({"fault": f, "profiler": "2/1/20"} for f in (*_RAISED, *_VANISHED)),
    *({"fault": "RuntimeError", "profiler": p} for p in ("none", "waiting", "warming", "always")),
    *({"fault": "RuntimeError", "profiler": p} for p in ("window", "simple", "advanced")),
    *({"fault": f, "profiler": "window", "module": "ppo"} for f in ("RuntimeError", "SIGINT")),
    {"fault": "RuntimeError", "profiler": "unwritable"},
    *({"fault": "RuntimeError", "profiler": "always", "again": a} for a in AGAIN),
    *({"fault": "RuntimeError", "profiler": "always", "others": o} for o in ("before", "after")),
    {"fault": "SIGTERM and SIGKILL in C", "profiler": "always"},
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
        if (p, s) not in (("always", "on_train_start"), ("always", "validation_step"))
    ),
    *(
        {"fault": f, "profiler": "none", "site": "loader", "workers": 2}
        for f in ("RuntimeError", "SIGTERM", "segfault", "os._exit3")
    ),
    {"fault": "SIGKILL", "profiler": "always", "site": "loader", "workers": 2},
    {"fault": "SIGTERM and SIGKILL in a long step", "profiler": "always"},
    *({"fault": "room for a report", "profiler": p} for p in ("none", "always")),
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
