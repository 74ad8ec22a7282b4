"""Two hosts on one machine: network namespaces, each with a name and processes of its own.

A process sees no process of the other host. When the program of a host ends, all of the host's
processes end, as in a container.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import forked

_NAMES = ("hosta", "hostb")
_OF_ITS_OWN = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
_BEGIN = 'hostname "$1"; shift; "$@"'  # without exec: a first process ignores its own SIGKILL


@dataclass(frozen=True)
class Ended:
    """The end of the program of each host."""

    statuses: tuple[int, int]
    survived_s: float  # from the end of one program to the end of the other
    outputs: tuple[str, str]


class HostsError(RuntimeError):
    """Raised where no network namespaces can be made, with the reason."""


class Hosts:
    """Two hosts that are connected by a network of their own."""

    def __init__(self) -> None:
        own = os.getpid()
        self._spaces = tuple(f"esper{letter}{own}" for letter in "ab")
        self._devices = tuple(f"ve{letter}{own}" for letter in "ab")

    def make(self) -> None:
        """Make the namespaces.

        Raises:
            HostsError: If that is not allowed here.
        """
        for space in self._spaces:
            _call("ip", "netns", "add", space)
        one, other = self._devices
        _call("ip", "link", "add", one, "type", "veth", "peer", "name", other)
        for number, (space, device) in enumerate(zip(self._spaces, self._devices, strict=True), 1):
            _call("ip", "link", "set", device, "netns", space)
            inside = ("ip", "netns", "exec", space, "ip")
            _call(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", device)
            _call(*inside, "link", "set", device, "up")
            _call(*inside, "link", "set", "lo", "up")
            _call("ip", "netns", "exec", space, *_OF_ITS_OWN, "sh", "-c", _BEGIN, "sh", "x", "true")

    def remove(self) -> None:
        """Remove the namespaces, and with them their devices."""
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._devices[0]], capture_output=True, check=False)

    def run(
        self, words: Sequence[Sequence[object]], folders: Sequence[Path], *, port: int
    ) -> Ended:
        """Run a Python program on each host, one rank of two each.

        Args:
            words: Words after ``python``, for each host.
            folders: Directory in which the program of each host starts.
            port: Port at which the ranks meet, on the first host.
        """
        processes: list[subprocess.Popen[bytes]] = []
        for node, folder in enumerate(folders):
            folder.mkdir(parents=True, exist_ok=True)
            env = {
                **os.environ,
                **forked.QUIET,
                "PYTHONPATH": str(forked.ROOT),
                "TORCH_COMPILE_DISABLE": "1",
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": str(port),
                "NODE_RANK": str(node),
                "LOCAL_RANK": "0",
                "GLOO_SOCKET_IFNAME": self._devices[node],
            }
            host = ("ip", "netns", "exec", self._spaces[node], *_OF_ITS_OWN)
            program = [sys.executable, *map(str, words[node])]
            with (folder / "output").open("wb") as output:
                process = subprocess.Popen(
                    [*host, "sh", "-c", _BEGIN, "sh", _NAMES[node], *program],
                    cwd=folder,
                    env=env,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            processes.append(process)
        try:
            ends = _wait(processes)
        finally:
            for process in processes:
                process.kill()  # and with it everything on its host
                process.wait()
        outputs = [(folder / "output").read_text(errors="replace") for folder in folders]
        statuses = [process.returncode for process in processes]
        return Ended((statuses[0], statuses[1]), max(ends) - min(ends), (outputs[0], outputs[1]))


def _wait(processes: Sequence["subprocess.Popen[bytes]"], limit_s: float = 240.0) -> list[float]:
    """Times at which the processes ended, or the limit for those that did not."""
    begin, ends = time.monotonic(), dict[int, float]()
    while len(ends) < len(processes) and time.monotonic() - begin < limit_s:
        time.sleep(0.05)
        for number, process in enumerate(processes):
            if number not in ends and process.poll() is not None:
                ends[number] = time.monotonic()
    return [ends.get(number, float("inf")) for number in range(len(processes))]


def _call(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise HostsError(f"{words[0]}: {error}") from error
    if done.returncode:
        raise HostsError(f"{' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def two_hosts() -> Generator[Hosts]:
    """Two hosts, for as long as the context lasts.

    Raises:
        HostsError: If they cannot be made here.
    """
    hosts = Hosts()
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()
