"""Files and folders on their way, which tell whose they are, so that nothing stays of a killed job.

The name of each ends in a mark: the machine, the process, when that began, and some letters.  A
process is known by its number and the time of its start, since its number is given again; a
machine by its name, its boot and its space of process numbers, which containers do not share.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

log = logging.getLogger(__name__)

ABANDONED_S = 24 * 3600.0
"""Age from which what a process of another machine made counts as left behind."""
_MARK = re.compile(r"\.own-([0-9a-f]{12})-(\d+)-(\d+)-\w+$")


@functools.cache
def machine() -> str:
    """Return the name of this machine as far as processes on it can see one another, 12 digits."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    text = f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def start_time(pid: int) -> str | None:
    """Return when a process of this machine began, in the kernel's ticks; none if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state == "Z" else rest[18]


@dataclass(frozen=True)
class Process:
    """A process of some machine."""

    machine: str
    pid: int
    start: str

    @classmethod
    def here(cls) -> Self:
        """Return this process."""
        pid = os.getpid()
        return cls(machine(), pid, start_time(pid) or "0")

    @classmethod
    def of(cls, name: str) -> Self | None:
        """Return the process that a name is marked with, or none."""
        match = _MARK.search(name)
        return cls(match[1], int(match[2]), match[3]) if match else None

    @property
    def is_near(self) -> bool:
        """Whether it is, or was, one of this machine, so that :attr:`is_alive` is known."""
        return self.machine == machine()

    @property
    def is_alive(self) -> bool:
        """Whether it lives here."""
        return self.is_near and start_time(self.pid) == self.start

    def mark(self) -> str:
        """Return the mark of its files, to be followed by something random."""
        return f".own-{self.machine}-{self.pid}-{self.start}-"


def make_folder(prefix: str = "lorat", parent: Path | None = None) -> Path:
    """Make a folder of this user alone with this process's mark.

    Args:
        prefix: of its name.
        parent: where it is made; none means where temporary files are.
    """
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{Process.here().mark()}", dir=parent))


def make_public_folder(prefix: str, parent: Path) -> Path:
    """Make a folder with this process's mark that will be in view: its mode follows the umask."""
    folder = marked(prefix, parent)
    folder.mkdir()
    return folder


def follow_umask(folder: Path) -> None:
    """Give a folder and what is in it the modes of new ones; copies keep those of the original."""
    probe = make_public_folder(".mode-", folder)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


def make_file(prefix: str, parent: Path) -> Path:
    """Make an empty file with this process's mark in a folder; its mode follows the umask."""
    file = marked(prefix, parent)
    _make_empty(file)
    return file


def _make_empty(file: Path) -> int:
    """Make a file that is not there yet and return its mode, which follows the umask."""
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def marked(prefix: str, parent: Path) -> Path:
    """Return a path in a folder, with this process's mark, that nobody uses."""
    return parent / f"{prefix}{Process.here().mark()}{secrets.token_hex(4)}"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield where to write a file; a reader sees the old one or the whole new one.

    Where writing fails, the old one stays.  The mode follows the umask, whoever writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = marked(".part-", path.parent)  # the name itself may be as long as a name can be
    mode = _make_empty(part)
    try:
        yield part
        if stat.S_IMODE(part.stat().st_mode) != mode:  # safetensors writes for the owner alone
            part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder for the length of a ``with`` block, where temporary files are by default."""
    folder = make_folder(parent=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> list[Path]:
    """Remove what processes that are gone have left directly in a folder; return what it was.

    What others' processes, of another machine or user, have made stays: the former for a day.
    """
    removed = []
    with contextlib.suppress(FileNotFoundError):
        for path in list(parent.iterdir()):
            owner = Process.of(path.name)
            if owner is not None and _is_left(path, owner):
                remove(path)
                removed.append(path)
    return removed


def _is_left(path: Path, owner: Process) -> bool:
    try:
        state = path.lstat()
    except FileNotFoundError:  # its owner has just removed it
        return False
    if state.st_uid != os.getuid():
        return False
    if owner.is_near:
        return not owner.is_alive
    return time.time() - state.st_mtime > ABANDONED_S


def remove(path: Path) -> None:
    """Remove a file or folder that nobody needs; where that fails it is said, and stays."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # somebody else removes it, too
        return
    except OSError as error:
        log.warning("%s, which a killed job left, cannot be removed: %s", path, error.strerror)
