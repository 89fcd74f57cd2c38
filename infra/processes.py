"""Servers of a test as processes: started with their own log, watched, and stopped by their id."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path


class Failure(Exception):
    """What went wrong, in one sentence."""


def say(message: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {message}", flush=True)


STARTED = time.monotonic()


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = Path(stat).read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.split("/")[2]))
    members = [pid]
    for member in members:
        members += children.get(member, [])
    return members


def wait_for(what: str, ready: Callable[[], bool], *, seconds: float) -> None:
    """Poll until ``ready`` is true; a server that does not answer yet is not ready.

    Raises:
        Failure: if it is not in time.
    """
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if ready():
                return
        if time.monotonic() > end:
            raise Failure(f"{what} took longer than {seconds:.0f} s.")
        time.sleep(0.5)


def answers(url: str) -> bool:
    """Tell whether a server answers at all."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def listeners() -> dict[str, tuple[str, int]]:
    """Return address and port of every listening socket of this machine, by name in /proc."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                address, _, port = fields[1].partition(":")
                found[f"socket:[{fields[9]}]"] = _readable(address), int(port, 16)
    return found


class Processes:
    """Started processes by name, each with its own log file and process group."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str | Path, user: str | None = None) -> None:
        """Start a process; its output goes to ``NAME.log``."""
        with open(self.folder / f"{name}.log", "wb") as log:
            self.running[name] = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
                user=user,
                start_new_session=True,
            )

    def run(self, *command: str | Path, user: str | None = None) -> str:
        """Run a command to its end and return what it printed.

        Raises:
            Failure: if it fails.
        """
        result = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=self.folder,
            user=user,
        )
        if result.returncode:
            raise Failure(f"{command[0]} failed: {result.stdout[-2000:]}{result.stderr[-2000:]}")
        return result.stdout

    def kill(self, name: str) -> None:
        """Kill a process and all its descendants at once, as a lost machine would."""
        for pid in family(self.running.pop(name).pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def listening(self) -> dict[str, set[tuple[str, int]]]:
        """Return the addresses and ports on which each process and its descendants listen."""
        by_inode = listeners()
        found: dict[str, set[tuple[str, int]]] = {}
        for name, process in self.running.items():
            for pid in family(process.pid):
                for handle in glob.glob(f"/proc/{pid}/fd/*"):
                    with contextlib.suppress(OSError):
                        address = by_inode.get(os.readlink(handle))
                        if address:
                            found.setdefault(name, set()).add(address)
        return found

    def stop(self) -> None:
        """Ask everything to end; kill what has not after 15 s, and every descendant."""
        members = [pid for process in self.running.values() for pid in family(process.pid)]
        for process in reversed(self.running.values()):
            process.terminate()
        end = time.monotonic() + 15
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, end - time.monotonic()))
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.running.values():
            process.wait()


def _readable(address: str) -> str:
    """Turn the hexadecimal address of /proc/net/tcp into the usual notation."""
    packed = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
    family_ = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return socket.inet_ntop(family_, packed)
