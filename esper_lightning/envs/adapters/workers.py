"""Environments of Gymnasium that are stepped in worker processes.

Axes: ``B`` environment. Workers are forked, so that no worker repeats an import. A worker ends when
the process that started it ends, even if that process is killed.
"""
# pyright: reportUnknownVariableType=false

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from esper_lightning.envs.adapters.curriculum import pass_progress
from esper_lightning.envs.base import RunProgress, closed_after_error

__all__ = ["WorkerEnv"]

_PR_SET_PDEATHSIG = 1
_END_S = 5.0


class WorkerEnv:
    """A vector environment whose rows are shared among forked processes.

    The class implements Gymnasium's vector API, and resets single environments.

    Args:
        make: Function that makes the vector environment of one worker from the worker's number of
            environments.
        num_envs: Number of environments, ``B``.
        workers: Number of processes; at most ``num_envs``.
        name: Name of the task in errors.

    Raises:
        RuntimeError: If a worker fails or dies, here or in a method; the error names task and
            worker.
    """

    def __init__(
        self, make: Callable[[int], Any], num_envs: int, workers: int, *, name: str
    ) -> None:
        self.num_envs, self._name = num_envs, name
        bounds = np.linspace(0, num_envs, min(workers, num_envs) + 1).astype(int).tolist()
        self._rows = [slice(low, high) for low, high in itertools.pairwise(bounds)]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        context = multiprocessing.get_context("fork")
        for rows in self._rows:
            ours, theirs = context.Pipe()
            arguments = (make, rows.stop - rows.start, theirs, [*self._pipes, ours], os.getpid())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        with closed_after_error(self):
            answers = self._ask([("spaces", ())] * len(self._rows))
        self.single_observation_space, self.single_action_space, self.metadata = answers[0]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start new episodes, everywhere or where ``options["reset_mask"]`` is true."""
        if options is None:
            seeds = [None if seed is None else seed + rows.start for rows in self._rows]
            return self._join(self._ask([("reset", (one, None)) for one in seeds]))
        mask = options["reset_mask"]
        asked = [mask[rows] for rows in self._rows]
        return self._join(self._ask([("reset", (None, rows)) for rows in asked]))

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Act in every environment."""
        results = self._ask([("step", (actions[rows],)) for rows in self._rows])
        obs, info = self._join([(result[0], result[4]) for result in results])
        flags = [np.concatenate(each) for each in zip(*(r[1:4] for r in results), strict=True)]
        return obs, flags[0], flags[1], flags[2], info

    def begin_iteration(self, progress: RunProgress) -> None:
        """Pass the progress of the run to every environment."""
        self._ask([("begin_iteration", (progress,))] * len(self._rows))

    def close(self) -> None:
        """End the workers; kill workers that do not end in time."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(("close", ()))
            pipe.close()
        for process in self._processes:
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []

    def _ask(self, requests: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """Send a request to every worker, and return the answers once all have come."""
        answers: list[Any] = []
        for number, (pipe, request) in enumerate(zip(self._pipes, requests, strict=True)):
            with self._named(number):
                pipe.send(request)
        for number, pipe in enumerate(self._pipes):
            with self._named(number):
                ok, answer = pipe.recv()
                if not ok:
                    raise RuntimeError(f"{self._place(number)} failed:\n{answer}")
                answers.append(answer)
        return answers

    @contextlib.contextmanager
    def _named(self, number: int) -> Any:
        try:
            yield
        except (EOFError, OSError) as error:
            process = self._processes[number]
            process.join(1.0)
            code = process.exitcode
            how = f"status {code}" if code is None or code >= 0 else signal.Signals(-code).name
            raise RuntimeError(f"{self._place(number)} died ({how}).") from error

    def _place(self, number: int) -> str:
        rows = self._rows[number]
        return f"{self._name}: worker {number} (environments {rows.start} to {rows.stop - 1})"

    def _join(self, answers: list[tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
        """Observations and ``info`` of all rows, joined from the answers of the workers."""
        observations, infos = zip(*answers, strict=True)
        if isinstance(observations[0], dict):
            obs: Any = {n: np.concatenate([o[n] for o in observations]) for n in observations[0]}
        else:
            obs = np.concatenate(observations)
        info: dict[str, Any] = {}
        for name in dict.fromkeys(name for one in infos for name in one):
            values = [value for one in infos if (value := one.get(name)) is not None]
            whole = len(values) == len(infos) and all(isinstance(v, np.ndarray) for v in values)
            if whole:
                info[name] = np.concatenate(values)
                continue
            joined = np.full(self.num_envs, None, object)
            for rows, one in zip(self._rows, infos, strict=True):
                if isinstance(one.get(name), np.ndarray):
                    for row, value in zip(range(rows.start, rows.stop), one[name], strict=True):
                        joined[row] = value
            if name.startswith("_"):
                joined = np.array([bool(value) for value in joined])
            info[name] = joined
        return obs, info


def _work(
    make: Callable[[int], Any],
    num_envs: int,
    pipe: Connection,
    of_parent: list[Connection],
    parent: int,
) -> None:
    """Answer requests in a worker process until it is to close, or an error ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process closes the worker
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for other in of_parent:
        other.close()
    env: Any = None
    try:
        env = make(num_envs)
        while True:
            name, arguments = pipe.recv()
            if name == "close":
                return
            pipe.send((True, _answer(env, num_envs, name, arguments)))
    except EOFError:
        return
    except BaseException:
        with contextlib.suppress(OSError, pickle.PicklingError):
            pipe.send((False, traceback.format_exc()))
    finally:
        if env is not None:
            with contextlib.suppress(Exception):
                env.close()


def _answer(env: Any, num_envs: int, name: str, arguments: tuple[Any, ...]) -> Any:
    if name == "spaces":
        return env.single_observation_space, env.single_action_space, env.metadata
    if name == "step":
        return env.step(*arguments)
    if name == "begin_iteration":
        return pass_progress(env, *arguments)
    seed, rows = arguments
    if rows is None:
        return env.reset(seed=seed)
    if rows.any():
        return env.reset(options={"reset_mask": rows})
    space: Any = env.single_observation_space  # rows that were not reset are not read
    empty = _zeros(space, num_envs)
    return empty, {}


def _zeros(space: Any, num_envs: int) -> Any:
    if type(space).__name__ == "Dict":
        return {name: _zeros(each, num_envs) for name, each in space.spaces.items()}
    return np.zeros((num_envs, *space.shape), space.dtype)
