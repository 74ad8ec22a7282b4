"""Two hosts on one machine: network namespaces with a name and a disk of their own.

A process takes the processes of the other host for those of another machine, which it cannot see.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import forked

_NAMES = ("hosta", "hostb")
_BEGIN = 'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'


@dataclass(frozen=True)
class Ended:
    """The end of the program of each host."""

    statuses: tuple[int, int]
    survived_s: float  # from the end of one program to the end of the other
    outputs: tuple[str, str]


class HostsError(RuntimeError):
    """Raised where no network namespaces can be made, with the reason."""


class Hosts:
    """Two hosts that are connected by a network of their own.

    Args:
        folder: Empty folder for the disks of the hosts. Everything else is a disk that they share.

    Attributes:
        disk: Path at which each host has its own disk.
        disks: Paths of both disks for everybody else.
    """

    def __init__(self, folder: Path) -> None:
        self.disk = folder / "disk"
        self.disks = tuple(folder / f"disk_of_{name}" for name in _NAMES)
        for path in (self.disk, *self.disks):
            path.mkdir()
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
            _call(*self._within(number - 1), "true")

    def remove(self) -> None:
        """Remove the namespaces, and with them their devices."""
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._devices[0]], capture_output=True, check=False)

    def run(self, words: Sequence[object], name: str, *, port: int) -> Ended:
        """Run a Python program on each host, one rank of two each.

        Args:
            words: Words after ``python``.
            name: Name of the folder on each disk in which the programs start.
            port: Port at which the ranks meet, on the first host.
        """
        processes: list[forked.Forked] = []
        for node, disk in enumerate(self.disks):
            (disk / name).mkdir(exist_ok=True)
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
            with (disk / name / "output").open("wb") as output:
                how = {"cwd": self.disk / name, "env": env, "within": self._within(node)}
                processes.append(forked.start(words, output=output, **how))
        try:
            ends = _wait(processes)
        finally:
            for process in processes:
                process.kill()
        statuses = [process.wait() for process in processes]
        outputs = [(d / name / "output").read_text(errors="replace") for d in self.disks]
        return Ended((statuses[0], statuses[1]), max(ends) - min(ends), (outputs[0], outputs[1]))

    def _within(self, node: int) -> tuple[str, ...]:
        """Words that start a command on a host."""
        space = ("ip", "netns", "exec", self._spaces[node])
        begin = ("unshare", "--uts", "--mount", "sh", "-c", _BEGIN, "sh", _NAMES[node])
        return (*space, *begin, str(self.disks[node]), str(self.disk))


def _wait(processes: Sequence[forked.Forked], limit_s: float = 600.0) -> list[float]:
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
def two_hosts(folder: Path) -> Generator[Hosts]:
    """Two hosts, for as long as the context lasts.

    Args:
        folder: Empty folder for their disks.

    Raises:
        HostsError: If they cannot be made here.
    """
    hosts = Hosts(folder)
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()
