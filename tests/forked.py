"""Python programs in processes of their own, without the seconds in which each imports torch.

A server imports torch once, before it starts any thread, and forks each program. ``start`` is used
like ``subprocess.Popen([sys.executable, ...])``. A program has the server's interpreter options and
encoding of streams, and the package is imported already.

With ``children``, the ``sys.executable`` of a program is a stand-in, whose processes the server
forks as well.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
_MOST_BYTES = 1 << 17
_NUMBER_BYTES = 16
_PYTHON = "FORKED_BY_PYTHON"  # environment variable with the interpreter behind a stand-in
_LOOK_S = 0.02  # between looks at a program whose stand-in may be killed
_STAND_IN = """#!{python} -ISE
import json, os, signal, socket, sys
words = sys.argv[1:]
known = words and (words[0] in ("-m", "-c") or not words[0].startswith("-"))
if not known or words[0] == "-m" and words[1].split(".")[0] in ("pip", "pytest", "venv"):
    os.execv({python!r}, [{python!r}, *words])
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({address!r})
reads, writes = os.pipe()
request = json.dumps([words, os.getcwd(), dict(os.environ), False, {stand_in!r}])
socket.send_fds(connection, [request.encode()], [1, 2, writes, 0])
os.close(writes)
for descriptor in (0, 1):  # only the program holds their other ends
    os.close(descriptor)
program = int(os.read(reads, {bytes}))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(program, number))
status = int(os.read(reads, {bytes}) or -9)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if status != -9 else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class Forked:
    """A process that was forked.

    Attributes:
        pid: Number of the process.
        returncode: Exit status as in ``subprocess.Popen``; ``None`` while the process runs.
    """

    def __init__(self, pid: int, status: int) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process.

        Raises:
            subprocess.TimeoutExpired: If the process runs longer.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(["forked"], timeout or 0.0)
            self.returncode = _read_number(self._status)
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        """The exit status of the process; ``None`` while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[object],
    *,
    output: Any,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    new_session: bool = False,
    children: bool = False,
    within: tuple[str, ...] = (),
) -> Forked:
    """Start a program; its standard input is empty.

    Args:
        arguments: Words that would follow ``python``: a file, or ``-m`` and a module, or ``-c`` and
            code, and then the arguments of the program.
        output: File, or descriptor, of standard output and error; a pair where they differ.
        cwd: Directory in which the program starts.
        env: Environment variables; by default those of this process with ``QUIET``.
        new_session: Whether the process leads a session of its own.
        children: Whether processes of ``sys.executable`` that the program starts are forked, too.
        within: Command that starts a server elsewhere, such as ``("ip", "netns", "exec", NAME)``.
            Identifiers of processes must be the same there.
    """
    variables = {**os.environ, **QUIET} if env is None else dict(env)
    words = [str(word) for word in arguments]
    place = str(cwd or Path.cwd())
    connection, stand_in = _server(within)
    own = stand_in if children else None
    request = json.dumps([words, place, variables, new_session, own]).encode()
    reads, writes = os.pipe()
    outputs = output if isinstance(output, tuple) else (output, output)
    descriptors = [one if isinstance(one, int) else one.fileno() for one in outputs]
    socket.send_fds(connection, [request], [*descriptors, writes])
    os.close(writes)
    return Forked(_read_number(reads), reads)


def run(
    arguments: Sequence[object], *, timeout: float = 240.0, **how: Any
) -> "subprocess.CompletedProcess[str]":
    """Start a program, wait for its end, and return its output.

    Raises:
        subprocess.TimeoutExpired: If the program runs longer; it is killed then.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start(arguments, output=(stdout, stderr), **how)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        written = []
        for file in (stdout, stderr):
            file.seek(0)
            written.append(file.read().decode())
    return subprocess.CompletedProcess(list(arguments), status, *written)


def _read_number(pipe: int) -> int:
    return int(os.read(pipe, _NUMBER_BYTES))


def _write_number(pipe: int, number: int) -> None:
    os.write(pipe, str(number).encode().ljust(_NUMBER_BYTES))


def _paths() -> list[str]:
    return [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


@functools.cache
def _server(within: tuple[str, ...] = ()) -> tuple[socket.socket, str]:
    """The connection to the server of this process, and the path of the stand-in for ``python``.

    The server ends with the process.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = tempfile.mkdtemp(prefix="forked-")
    address, stand_in = f"{folder}/socket", f"{folder}/python"
    python = os.environ.get(_PYTHON, sys.executable)
    subprocess.Popen(
        [*within, python, __file__, str(its.fileno()), address],
        cwd=ROOT,
        env={**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(_paths())},
        pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ).returncode = 0  # it leaves by itself
    its.close()
    names = {"python": python, "address": address, "stand_in": stand_in}
    Path(stand_in).write_text(_STAND_IN.format(**names, bytes=_NUMBER_BYTES))
    Path(stand_in).chmod(0o755)
    assert ours.recv(100) == b"ready"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(ours.close)
    return ours, stand_in


# In the server.


def _serve(connection: socket.socket, address: str) -> list[str]:
    """Fork for each request; returns in the forked process, which becomes the program."""
    sys.path[0] = str(ROOT)  # not the folder of this file
    import torch  # noqa: PLC0415

    import esper_lightning.cli.lightning_cli  # noqa: PLC0415, F401

    torch.set_num_threads(1)
    gc.freeze()  # garbage collections in programs skip the imported objects
    of_python = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGKILL, signal.SIGSTOP}
    for number in signal.valid_signals() - of_python:
        signal.signal(number, signal.SIG_DFL)  # a test run may be in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    connection.send(b"ready")
    while True:
        for ready in select.select([connection, listener], [], [])[0]:
            stand_in = listener.accept()[0] if ready is listener else None
            request, descriptors, _, _ = socket.recv_fds(stand_in or connection, _MOST_BYTES, 4)
            if not request and stand_in is None:
                os._exit(0)
            between = os.fork() if request else -1
            if between == 0:
                connection.close()
                listener.close()
                program = os.fork()
                if program == 0:
                    if stand_in is not None:
                        stand_in.close()
                    return _become(request, *descriptors)
                _report(program, descriptors, stand_in)
            for descriptor in descriptors:
                os.close(descriptor)
            if stand_in is not None:
                stand_in.close()
        # What is between forks and waits for a program: nothing has to wait for it here.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _report(program: int, descriptors: Sequence[int], stand_in: socket.socket | None) -> None:
    """Send the number and in the end the exit status of the program, and exit.

    A program ends with its stand-in.
    """
    status = descriptors[2]
    _write_number(status, program)
    for descriptor in {*descriptors} - {status}:
        os.close(descriptor)
    waited = 0, 0
    while stand_in is not None and not waited[0]:
        if select.select([stand_in], [], [], _LOOK_S)[0]:
            os.kill(program, signal.SIGKILL)
            break
        waited = os.waitpid(program, os.WNOHANG)
    ended = waited[1] if waited[0] else os.waitpid(program, 0)[1]
    with contextlib.suppress(BrokenPipeError):  # nobody waited
        _write_number(status, os.waitstatus_to_exitcode(ended))
    os._exit(0)


def _become(request: bytes, stdout: int, stderr: int, status: int, *stdin: int) -> list[str]:
    words, folder, variables, new_session, stand_in = json.loads(request)
    if new_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    if stdin:
        os.dup2(stdin[0], 0)
    for descriptor in {stdout, stderr, status, *stdin}:
        os.close(descriptor)
    if stand_in is not None:
        os.environ[_PYTHON], sys.executable = sys.executable, stand_in
    return words


def _execute(words: Sequence[str]) -> None:
    """Run a program as ``python`` with these arguments would."""
    main = sys.modules["__main__"]
    kind, rest = words[0], list(words[1:])
    if kind == "-m":
        sys.argv, sys.path[0] = rest, str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.argv, sys.path[0] = list(words), str(Path(kind).parent)
        main.__file__ = kind
        code = compile(Path(kind).read_bytes(), kind, "exec")
    exec(code, main.__dict__)


if __name__ == "__main__":
    _execute(_serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]))
