"""The right to drive a run, a search or whatever else a folder holds: one process has it at a time.

Announce, then look.  Who wants the right writes a file of its own, ``driver-TOKEN.json``, into the
folder and lists the folder afterwards; it has the right if nobody else is announced there who may
live.  Of two that announce themselves at once, the one that looks later sees the other, so that
never both have it.  That asks no more of a storage than that a listing shows what was written
before it, as file systems, NFS, S3 and Google's store promise; PyArrow has no conditional put.  Of
several that only see one another, the lowest token waits and the others withdraw.

The owner writes its file again every few seconds.  How old that is, is the difference between two
times that the storage gave, that of the owner's file and that of the one which was just announced,
so no clock of another machine is trusted.  An owner that died on this machine is followed at once,
any other when its lease has run out; whoever follows has a higher rank, so that an owner which
slept meanwhile knows on its next look that it is one no more.

Between a look and the write or deletion after it, an owner may still be suspended for longer than
its lease; that window, of milliseconds in a process that runs, is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Self

import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

from lorat.config.bounds import Bounds
from lorat.config.json_files import parse_json
from lorat.errors import UserError, reason
from lorat.files.scratch import Process
from lorat.files.storage import Location

log = logging.getLogger(__name__)

LEASE_S = 60.0
"""Age at which the lease of an owner that cannot be asked has run out."""
RENEW_S = 10.0
"""Seconds between two renewals."""
LOOK_S = 0.1
"""Seconds between two looks at others that want the right, too."""
PATIENT_LOOK_S = 1.0
"""Seconds between two looks at an owner of whom nobody knows whether it lives."""
RELEASE_S = 5.0
"""Longest wait for a renewal that is under way, at the end."""
_SHAPE = {
    "host": str,
    "process": {"machine": str, "pid": int, "start": str},
    "began": float,
    "held": bool,
    "rank": Annotated[int, Bounds(0, 2**53)],
}
"""What a driver's file holds."""
_FILE = re.compile(r"driver-([0-9a-f]{16})\.json")


class Driven(UserError):
    """Another process has the right."""


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What a driver's file says, and how old it is."""

    token: str
    host: str
    process: Process
    began: float
    """When it announced itself, by its own clock; only ever shown."""
    held: bool = False
    """Whether it found nobody else, and has the right."""
    rank: int = 0
    """Higher than that of every owner that it followed."""
    written_s: float = 0.0
    """When its file was written last, by the storage's clock."""

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        values = dataclasses.asdict(self)
        del values["token"], values["written_s"]
        return json.dumps(values).encode()

    @classmethod
    def read(cls, token: str, data: bytes, written_s: float) -> Self:
        """Read a driver's file; a damaged one is of a process about which nothing is known."""
        try:
            values = parse_json(data, "a driver's file", "delete it", shape=_SHAPE)
            return cls(
                token=token,
                host=str(values["host"]),
                process=Process(**values["process"]),
                began=float(values["began"]),
                held=bool(values["held"]),
                rank=int(values["rank"]),
                written_s=written_s,
            )
        except UserError:
            unknown = Process("", 0, "")
            return cls(
                token=token, host="an unknown host", process=unknown, began=0.0, held=True,
                written_s=written_s,
            )  # fmt: skip

    def may_live(self, now_s: float) -> bool:
        """Tell whether its process lives, or may, at a time of the storage's clock."""
        if self.process.is_near:
            return self.process.is_alive
        return now_s - self.written_s < LEASE_S


class Lease:
    """The right of this process over a folder, renewed in the background until it is given back.

    Args:
        folder: what to have the right over; it must be there.
        what: what that is, as a sentence begins, such as ``The run mine``.
        otherwise: what else to do, such as ``give another --name``.
    """

    def __init__(self, folder: Location, what: str, otherwise: str) -> None:
        self._folder = folder
        self._what = what
        self._otherwise = otherwise
        self._own = Announcement(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            process=Process.here(),
            began=time.time(),
        )
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._renewed_at = 0.0
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @property
    def token(self) -> str:
        """The name of this right, for :func:`check_held`."""
        return self._own.token

    @property
    def is_lost(self) -> bool:
        """Whether another process was seen to have taken the right over."""
        return self._lost is not None

    def claim(self, *, patient: bool = False) -> Self:
        """Take the right.

        Args:
            patient: wait until an owner on another machine renews its lease or lets it run out,
                where else this is refused as long as nobody knows whether it lives.

        Raises:
            Driven: if another process has it.
            UserError: if the folder cannot be written.
        """
        try:
            dead = self._wait_for_the_others(patient)
            for other in dead:
                self._folder.delete(_file(other.token))
            rank = 1 + max((other.rank for other in dead), default=0)
            self._own = dataclasses.replace(self._own, held=True, rank=rank)
            self._write()
        except (OSError, pa.ArrowException) as error:
            self._withdraw()
            raise UserError(
                f"Cannot write to {self._folder.uri}: {reason(error)}; make room there or give "
                "another place, then run the same command again."
            ) from error
        except BaseException:
            self._withdraw()
            raise
        self._thread.start()
        return self

    def _wait_for_the_others(self, patient: bool) -> list[Announcement]:
        """Announce this process until nobody else may live; return those that do not.

        Raises:
            Driven: if one has the right.
        """
        first_seen: dict[str, float] = {}
        while True:
            self._write()
            _, others, now_s = self._look()
            living = [other for other in others if other.may_live(now_s)]
            if not living:
                return others
            owners = [other for other in living if other.held]
            for owner in owners:
                known = owner.token in first_seen
                renewed = owner.written_s > first_seen.setdefault(owner.token, owner.written_s)
                if owner.process.is_near or renewed or not patient:
                    raise Driven(self._refusal(owner, now_s - owner.written_s))
                if not known:
                    log.info(
                        "%s was driven by process %d on %s %.0f s ago; waiting for up to %.0f s "
                        "for it to go on or to be dead",
                        self._what, owner.process.pid, owner.host, now_s - owner.written_s,
                        LEASE_S - (now_s - owner.written_s),
                    )  # fmt: skip
            first = min(living, key=lambda other: other.token)
            if not owners and first.token < self.token:
                self._withdraw()
                self._wait_until_decided(first)
            time.sleep(PATIENT_LOOK_S if owners else LOOK_S)

    def _wait_until_decided(self, other: Announcement) -> None:
        """Let one that comes first take the right, or withdraw, or be dead."""
        deadline = time.monotonic() + LEASE_S
        while time.monotonic() < deadline and (other.process.is_alive or not other.process.is_near):
            found = {each.token: each for each in announcements(self._folder)}
            if other.token not in found or found[other.token].held:
                return
            time.sleep(LOOK_S)

    def _refusal(self, owner: Announcement, age_s: float) -> str:
        where = f"this machine ({owner.host})" if owner.process.is_near else owner.host
        text = (
            f"{self._what} is driven by process {owner.process.pid} on {where}, since "
            f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(owner.began))} and with its last "
            f"sign of life {max(age_s, 0.0):.0f} s ago; wait for it, stop it, or {self._otherwise}"
        )
        if owner.process.is_near:
            return f"{text}."
        return f"{text} (if it is dead, the same command works in {LEASE_S - age_s:.0f} s)."

    def confirm(self) -> None:
        """Renew the lease, and make sure that it was not taken over meanwhile.

        Raises:
            UserError: if another process took the right over, which this one must not disturb.
            OSError: or another error of the storage, if that cannot be asked.
        """
        with self._mutex:
            self._raise_if_lost()
            if self._ended.is_set():
                return
            there, others, _ = self._look()
            while not self._find_lost(there, others):
                self._write()
                there, others, now_s = self._look()
                # Who is announced after the file was written sees that it is fresh; who was
                # announced before may have found it old, and either takes over or withdraws.
                if all(other.held or not other.may_live(now_s) for other in others):
                    break
                time.sleep(LOOK_S)
            self._find_lost(there, others)
            self._raise_if_lost()

    def _find_lost(self, there: bool, others: list[Announcement]) -> bool:
        above = [other for other in others if other.held and other.rank > self._own.rank]
        if above or not there:
            by = f" by process {above[0].process.pid} on {above[0].host}" if above else ""
            self._lost = (
                f"{self._what} was taken over{by} while this process was suspended or could not "
                "reach the storage; it goes on there, and this process ends without touching it."
            )
            self._withdraw()
        return self.is_lost

    def check(self, *, within_s: float = math.inf) -> None:
        """Stop a process that has lost the right.

        Args:
            within_s: age of the last renewal from which the storage is asked.

        Raises:
            UserError: if another process took the right over.
        """
        self._raise_if_lost()
        if time.time() - self._renewed_at > within_s:
            self.confirm()

    def is_lost_now(self) -> bool:
        """Ask the storage, if that answers, whether another process took the right over."""
        with contextlib.suppress(UserError, OSError, pa.ArrowException):
            self.confirm()
        return self.is_lost

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise UserError(self._lost)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self.confirm()
            except UserError:  # kept, and raised in the threads that ask
                return
            except (OSError, pa.ArrowException) as error:
                # Nobody else reaches the storage to take over, or confirm() will find that out.
                log.debug("%s: the lease cannot be renewed: %s", self._what, reason(error))

    def release(self) -> None:
        """Give the right back."""
        self._ended.set()
        # A renewal may hang in a storage that does not answer.
        if self._mutex.acquire(timeout=RELEASE_S):
            self._withdraw()
            self._mutex.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _write(self) -> None:
        self._folder.write_bytes(_file(self.token), self._own.to_bytes())
        self._renewed_at = time.time()

    def _withdraw(self) -> None:
        try:
            self._folder.delete(_file(self.token))
        except (OSError, pa.ArrowException) as error:
            log.warning(
                "The file %s cannot be deleted (%s); it counts for %.0f s more.",
                self._folder.file(_file(self.token)), reason(error), LEASE_S,
            )  # fmt: skip

    def _look(self) -> tuple[bool, list[Announcement], float]:
        """Return whether the own file is there, the others, and now by the storage's clock."""
        found = announcements(self._folder)
        own = [each for each in found if each.token == self.token]
        others = [each for each in found if each.token != self.token]
        return bool(own), others, own[0].written_s if own else 0.0


def announcements(folder: Location) -> list[Announcement]:
    """Return who drives a folder, or wants to."""
    found = []
    for info in folder.filesystem.get_file_info(
        pafs.FileSelector(folder.path, allow_not_found=True)
    ):
        match = _FILE.fullmatch(info.base_name)
        if match and info.type == pafs.FileType.File:
            with contextlib.suppress(FileNotFoundError):  # withdrawn since
                data = _read(folder, info.base_name)
                found.append(Announcement.read(match[1], data, (info.mtime_ns or 0) / 1e9))
    return found


@tenacity.retry(
    retry=tenacity.retry_if_exception_type((OSError, pa.ArrowException))
    & tenacity.retry_if_not_exception_type(FileNotFoundError),
    stop=tenacity.stop_after_attempt(3),
    wait=tenacity.wait_fixed(LOOK_S),
    reraise=True,
)
def _read(folder: Location, name: str) -> bytes:
    """Read a driver's file, which is written again all the time: one failed answer is no answer."""
    return folder.read_bytes(name)


def check_held(folder: Location, token: str) -> None:
    """Make sure, in any process, that a right is still the one that counts.

    Raises:
        UserError: if another driver took over.
    """
    found = announcements(folder)
    own = [each for each in found if each.token == token]
    if not own or any(each.held and each.rank > own[0].rank for each in found):
        raise UserError(
            f"Another process has taken {folder.uri} over from the driver of this one; it goes on "
            "there, and this one ends without touching it."
        )


def is_mark(name: str) -> bool:
    """Tell whether a file of that name is a driver's."""
    return bool(_FILE.fullmatch(name))


def _file(token: str) -> str:
    return f"driver-{token}.json"
