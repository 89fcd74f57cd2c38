"""Decoded training pairs that all trials on a node share.

All trials of a search see the same pairs in the same order, so a pair needs to be decoded and
cropped once per node.  The cache is a folder (in memory where ``/dev/shm`` has room) of
memory-mapped blocks of consecutive pairs.  Whoever first misses a block makes it, under a file
lock that dies with its owner; the content follows from the pair's number alone.  Trials read from
the front and most stop early: when the cache is full, low blocks displace high ones.

The folder is named by the search's identity, which no other search has, and a block by everything
that decides its content.  Whatever is lost of it only costs time: a folder that vanishes is made
again, and where none can be used every trial decodes for itself.

Objects of Ray's store end with the process that made them, which here ends with its trial, and say
to nobody that somebody is making them; files outlive trials and a lock keeps others waiting.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from lorat.data.pairs.batches import Batch
from lorat.files.scratch import Process, make_file, marked, remove

log = logging.getLogger(__name__)

BLOCK = 32
"""Pairs in one block."""
MEMORY = Path("/dev/shm")
STALE_S = 3600.0
"""Age after which an unused cache of a search that is driven on another machine is removed."""
_PREFIX = "crops-"
"""Begin of the name of a search's folder, which is all that is ever removed."""
_DRIVER = "driver"
"""Begin of the name of a mark that tells which process of this machine drives the search."""

Load = Callable[[Sequence[int]], Batch]


def cache_roots() -> list[Path]:
    """Return where caches may be on this node: ``$LORAT_CROP_CACHE``, or in memory and on disk."""
    chosen = os.environ.get("LORAT_CROP_CACHE")
    if chosen:
        return [Path(chosen)]
    name = f"lorat-crops-{os.getuid()}"
    places = [MEMORY, Path(tempfile.gettempdir())]
    usable = [place / name for place in places if place.is_dir() and os.access(place, os.W_OK)]
    return [root for root in usable if _is_own(root)]


def _is_own(root: Path) -> bool:
    """Make a folder that only this user can use; False if somebody else has made it before.

    Whoever could write there would choose what is trained on, and which files are overwritten.
    """
    try:
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
        about = root.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            return False
        root.chmod(0o700)
    except OSError:  # full, or just removed
        return False
    return True


def cache_folder(search: str, max_bytes: int) -> Path | None:
    """Return the folder of a search's cache: where it is, or else memory if it has room, or a disk.

    A cache that fills the memory must not send the trials that follow to a second one on disk.

    Args:
        search: the search's identity.
        max_bytes: bound of the cache.

    Returns:
        None where this node has no place for it, which is said.
    """
    roots = cache_roots()
    if not roots:
        log.warning(
            "Neither %s nor %s has a place of this user's own for decoded crops, so every trial "
            "here decodes for itself; name a folder with LORAT_CROP_CACHE.",
            MEMORY, tempfile.gettempdir(),
        )  # fmt: skip
        return None
    name = f"{_PREFIX}{search}"
    for root in roots:
        if os.path.isdir(root / name):
            return root / name
    alone = len(roots) == 1
    roomy = alone or shutil.disk_usage(roots[0].parent).free >= 2 * max_bytes
    return roots[0 if roomy else -1] / name


def content_key(**parts: Any) -> str:
    """Name a sequence of pairs by everything that decides its content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class CropCache:
    """Pairs by number, from the blocks of a folder or from ``load``.

    Args:
        folder: the search's folder on this node, made if missing; none stores nothing.
        key: names the sequence of pairs (:func:`content_key`).
        load: decodes pairs, as :func:`lorat.data.pairs.sampler.load_pairs` does.
        max_bytes: bound of the folder over all keys; 0 stores nothing.
    """

    def __init__(self, folder: Path | None, key: str, load: Load, *, max_bytes: int) -> None:
        self.folder = folder
        self.key = key
        self.max_bytes = max_bytes
        self.num_decoded = 0
        """Pairs that this process decoded."""
        self.num_read = 0
        """Pairs that were asked for."""
        self._load = load
        self._own: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._warned = False
        self._users: IO[str] | None = None
        self._come_in()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; the blocks stay for the next trial."""
        self._own.clear()
        if self._users is not None:
            self._users.close()

    @property
    def hit_rate(self) -> float:
        """Share of the pairs asked for that this process did not have to decode."""
        return 1.0 - min(self.num_decoded / self.num_read, 1.0) if self.num_read else 0.0

    def read(self, start: int, stop: int) -> Batch:
        """Return pairs start, ..., stop - 1 as :func:`lorat.data.pairs.sampler.load_pairs` does."""
        first = start // BLOCK
        parts = []
        for block in range(first, (stop - 1) // BLOCK + 1):
            rows = self._block(block)
            low = block * BLOCK
            parts.append(rows[max(start - low, 0) : stop - low])
        self.num_read += stop - start
        with self._lock:
            for block in [b for b in self._own if b < first]:
                del self._own[block]
        names = parts[0].dtype.names or ()
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def prepare(self, block: int) -> None:
        """Make a block if nobody has it and nobody is making it."""
        if block not in self._own and not self._is_there(block):
            self._make(block, wait=False)

    def _come_in(self) -> None:
        """Make the folder and keep it as long as this cache is open, where that can be."""
        if self.folder is None:
            return
        try:
            users = _enter(self.folder)
        except OSError as error:
            self._warn(error)
            return
        with self._lock:
            if self._users is not None:
                self._users.close()
            self._users = users

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "The crop cache in %s cannot be used as it should (%s); what it lacks is decoded "
                "again, which only takes longer.",
                self.folder, error,
            )  # fmt: skip

    def _path(self, folder: Path, block: int) -> Path:
        return folder / f"{self.key}-{block:08d}.npy"

    def _is_there(self, block: int) -> bool:
        return self.folder is not None and os.path.exists(self._path(self.folder, block))

    def _block(self, block: int) -> np.ndarray:
        anew = False
        while True:
            with self._lock:
                own = self._own.get(block)
            if own is not None:
                return own
            if self.folder is not None:
                try:
                    return np.load(self._path(self.folder, block), mmap_mode="r")
                except FileNotFoundError:  # displaced since: made again
                    pass
                except (OSError, ValueError, EOFError) as error:  # damaged, or not ours to read
                    self._warn(error)
                    anew = True
            self._make(block, wait=True, anew=anew)

    def _make(self, block: int, *, wait: bool, anew: bool = False) -> None:
        """Decode a block unless it is there, or (where ``wait`` is not set) somebody does."""
        with contextlib.ExitStack() as held:
            lock = self._open_lock(block)
            if lock is not None:
                held.enter_context(lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    return
                except OSError as error:  # a file system without locks
                    self._warn(error)
            if block in self._own or (self._is_there(block) and not anew):
                return
            rows = _pack(self._load(range(block * BLOCK, (block + 1) * BLOCK)))
            with self._lock:
                self.num_decoded += BLOCK
            if not self._store(block, rows):
                with self._lock:
                    self._own[block] = rows
            if lock is not None:
                with contextlib.suppress(OSError):
                    os.unlink(lock.name)

    def _open_lock(self, block: int) -> IO[str] | None:
        """Open a block's lock, in a new folder where the old one is gone; none where that fails."""
        if self.folder is None:
            return None
        path = self.folder / f"{self.key}-{block:08d}.lock"
        try:
            with contextlib.suppress(FileNotFoundError):
                return open(path, "w")
            self._come_in()
            return open(path, "w")
        except OSError as error:
            self._warn(error)
            return None

    def _store(self, block: int, rows: np.ndarray) -> bool:
        """Write a block if it fits, or displaces higher ones; False if it stays here only."""
        if self.folder is None:
            return False
        path = self._path(self.folder, block)
        temporary = marked(f".part-{path.name}", self.folder)
        try:
            if not self._make_room(self.folder, block, rows.nbytes):
                return False
            with open(temporary, "wb") as file:
                np.save(file, rows)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._warn(error)
            return False
        return True

    def _make_room(self, folder: Path, block: int, num_bytes: int) -> bool:
        blocks = []
        for entry in os.scandir(folder):
            if entry.name.endswith(".npy"):
                with contextlib.suppress(FileNotFoundError):
                    number = int(entry.name.rpartition("-")[2][:-4])
                    blocks.append((number, entry.path, entry.stat().st_size))
        used = sum(size for _, _, size in blocks)
        blocks.sort()
        while used + num_bytes > self.max_bytes:
            if not blocks or blocks[-1][0] <= block:
                return False
            _, path, size = blocks.pop()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return shutil.disk_usage(folder).free > 2 * num_bytes


def _pack(batch: Batch) -> np.ndarray:
    """Put the arrays of a batch into one array of records."""
    num = len(next(iter(batch.values())))
    kind = np.dtype([(name, v.dtype, v.shape[1:]) for name, v in batch.items()])
    rows = np.empty(num, dtype=kind)
    for name, values in batch.items():
        rows[name] = values
    return rows


def _enter(folder: Path) -> IO[str]:
    """Make a cache's folder if it is missing, and keep it as long as the file returned is open.

    Raises:
        OSError: if that cannot be, or somebody else has made the folder around it meanwhile.
    """
    while True:
        if not os.environ.get("LORAT_CROP_CACHE") and not _is_own(folder.parent):
            raise PermissionError(errno.EACCES, "not this user's alone", str(folder.parent))
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # just removed
            users = open(folder / "users", "a")  # noqa: SIM115 (held as long as the cache)
            fcntl.flock(users, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(users.fileno()), os.stat(users.name)):
                    return users
            users.close()  # of a folder that was removed before the lock was had


@contextlib.contextmanager
def driven_here(search: str, max_bytes: int) -> Iterator[None]:
    """Tell the caches on this machine which process drives a search, while it does.

    When that process is gone, nobody needs a cache that no trial uses.

    Args:
        search: the search's identity.
        max_bytes: bound of the cache.
    """
    folder = cache_folder(search, max_bytes)
    mark: Path | None = None
    if folder is not None:
        try:
            with _enter(folder):
                mark = make_file(_DRIVER, folder)
        except OSError as error:
            log.warning("The folder %s for decoded crops cannot be used: %s", folder, error)
    try:
        yield
    finally:
        if mark is not None:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)


def remove_cache(search: str) -> None:
    """Remove the cache of a search, by its identity, from this node, wherever it is."""
    for root in cache_roots():
        shutil.rmtree(root / f"{_PREFIX}{search}", ignore_errors=True)


def remove_stale_caches() -> list[Path]:
    """Remove this user's caches that no process uses, and whose search's driver is gone.

    Of a search that is driven on another machine, which cannot be asked, they stay for an hour.
    """
    removed = []
    for folder in (folder for root in cache_roots() for folder in root.glob(f"{_PREFIX}*")):
        # Gone, in use, or another user's, in a place that LORAT_CROP_CACHE names for several.
        with contextlib.suppress(OSError), open(folder / "users", "r+") as users:
            if os.fstat(users.fileno()).st_uid != os.geteuid():
                continue
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_stale(folder):
                remove(folder)
                removed.append(folder)
    return removed


def _is_stale(folder: Path) -> bool:
    owners = [Process.of(mark.name) for mark in folder.glob(f"{_DRIVER}.*")]
    here = [owner for owner in owners if owner is not None and owner.is_near]
    if here:
        return not any(owner.is_alive for owner in here)
    return time.time() - folder.stat().st_mtime > STALE_S
