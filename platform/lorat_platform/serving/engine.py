"""The engine of a replica: the targets of all sessions go through the network in one batch.

One thread tracks.  Each tick takes the oldest frame of every session that has one, decodes them,
steps all their targets together, and answers.  A frame waits for those of other sessions only as
long as half a tick takes, and never when all sessions that are busy have one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorat.errors import UserError
from lorat_platform.serving import messages
from lorat_platform.serving.served_model import ServedModel
from lorat_platform.serving.session import Followed, Session, WaitingFrame
from lorat_platform.serving.settings import ServingSettings
from lorat_platform.serving.statistics import Statistics

log = logging.getLogger(__name__)

MAX_WAITING_BYTES = 1_000_000_000
"""Of the frames of all sessions that wait; the only one of a session is taken nevertheless."""
BUSY_S = 0.5
"""A session that had a frame this recently is waited for."""
_SMOOTHING = 0.1


@dataclass
class _Job:
    """A frame that is tracked in this tick."""

    session: Session
    frame: WaitingFrame
    image: np.ndarray | None = None
    new: Sequence[str] = ()
    failed: str | None = None

    @property
    def rows(self) -> list[Followed]:
        """The targets that look for themselves in this frame; new ones know where they are."""
        followed = self.session.followed
        return [each for name, each in followed.items() if name not in self.new]


class Engine:
    """Tracks for many sessions.

    Args:
        model: with which it begins.
        settings: limits.
        name: of the replica; begins the id of every session.
    """

    def __init__(self, model: ServedModel, settings: ServingSettings, name: str = "one") -> None:
        self.settings = settings
        self.name = name
        self.statistics = Statistics()
        self._model = model
        self._lock = threading.Condition()
        self._sessions: dict[str, Session] = {}
        self._ready: dict[Session, None] = {}
        self._last_tick: dict[Session, float] = {}
        self._tick_s = 0.0
        self._closed = False
        self._observers: list[Callable[[Session, np.ndarray, dict[str, Any]], None]] = []
        self._decoders = ThreadPoolExecutor(min(os.cpu_count() or 1, 8), "decode")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def model(self) -> ServedModel:
        """The model of new sessions, to which the others move with their next frame."""
        return self._model

    def use(self, model: ServedModel) -> None:
        """Go over to another model; the templates for it are made here, beside the tracking."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.prepare(model)
        with self._lock:
            self._model = model
        self.statistics.count("swaps")

    @property
    def is_alive(self) -> bool:
        """Whether frames are tracked."""
        return self._thread.is_alive()

    @property
    def num_sessions(self) -> int:
        """Sessions that are open."""
        return len(self._sessions)

    def models_in_use(self) -> dict[str, int]:
        """Count the sessions by the model that tracks them."""
        with self._lock:
            return dict(Counter(session.model.name for session in self._sessions.values()))

    def open(self, answer: Callable[[dict[str, Any]], None]) -> Session:
        """Begin a session.

        Args:
            answer: is called with every answer, from the thread that tracks.

        Raises:
            UserError: if there are too many.
        """
        with self._lock:
            if len(self._sessions) >= self.settings.max_sessions:
                raise UserError(
                    f"This server has {len(self._sessions)} sessions, the most that it takes; try "
                    "again later."
                )
            name = f"{self.name}.{secrets.token_hex(8)}"
            session = Session(name, self.settings, answer, self._model)
            self._sessions[name] = session
        self.statistics.count("sessions")
        return session

    def find(self, name: str) -> Session:
        """Return an open session.

        Raises:
            UserError: if there is none.
        """
        with self._lock:
            session = self._sessions.get(name)
        if session is None:
            raise UserError(
                "This session is over, or another replica has it; begin one, with the targets at "
                "their last boxes."
            )
        return session

    def close(
        self, session: Session, why: str = "", *, refused: bool = False, again: bool = False
    ) -> None:
        """End a session; it answers the reason, if there is one.

        Args:
            session: to end.
            why: one sentence for the client.
            refused: what it sent cannot be tracked; such sessions are counted.
            again: it did nothing wrong, and may begin again where it was.
        """
        with self._lock:
            known = self._sessions.pop(session.id, None)
            session.end(why)
            self._ready.pop(session, None)
            self._last_tick.pop(session, None)
        if known is None:
            return
        if refused:
            self.statistics.count("refused")
        if why:
            session.answer({"error": why} | ({"again": True} if again else {}))

    def command(self, session: Session, text: str) -> None:
        """Take a text message of a session.

        Raises:
            UserError: if it cannot be obeyed; the session is over then.
        """
        with self._ending(session):
            command = messages.parse_command(text)
            with self._lock:
                session.command(command)

    def frame(self, session: Session, data: bytes) -> None:
        """Take a binary message of a session.

        Raises:
            UserError: if it is no frame; the session is over then.
        """
        with self._ending(session):
            number, read, image = messages.parse_frame(data)
            with self._lock:
                session.frame(number, read, image)
                self._check_waiting(session)
                self._note(session)

    def _check_waiting(self, session: Session) -> None:
        """Refuse what a session keeps waiting where all of them keep too much, under the lock.

        Raises:
            UserError: if they do.
        """
        if session.waiting < 2:
            return
        waiting = sum(each.waiting_bytes for each in self._sessions.values())
        if waiting > MAX_WAITING_BYTES:
            raise UserError(
                f"Frames of {waiting:,} bytes wait in this server, and more than "
                f"{MAX_WAITING_BYTES:,} may not: send no faster than the answers come, or choose "
                "the order newest."
            )

    @contextlib.contextmanager
    def _ending(self, session: Session) -> Iterator[None]:
        try:
            if session.ended is not None:
                raise UserError(session.ended or "The session is over.")
            yield
        except UserError as error:
            self.close(session, str(error), refused=True)
            raise

    def _note(self, session: Session) -> None:
        if session.has_work and session not in self._ready:
            self._ready[session] = None
            self._lock.notify_all()

    def end_idle(self) -> None:
        """End the sessions that were silent for too long.

        Frames that wait for a client to read its answers do not keep its session.
        """
        limit = time.monotonic() - self.settings.idle_s
        with self._lock:
            idle = [s for s in self._sessions.values() if s.last_message < limit and not s.has_work]
        for session in idle:
            why = f"No message came for {self.settings.idle_s:g} s; begin again."
            self.close(session, why, again=True)

    def observe(self, observer: Callable[[Session, np.ndarray, dict[str, Any]], None]) -> None:
        """Call ``observer`` with session, frame and answer after every answer."""
        self._observers.append(observer)

    def stop(self) -> None:
        """End every session and the thread."""
        for session in list(self._sessions.values()):
            why = "The server stops; begin again, with the targets where they were."
            self.close(session, why, again=True)
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join(10)
        self._decoders.shutdown(wait=False)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._ready)
                if self._closed:
                    return
                self._wait_for_others()
                model, jobs = self._model, self._take()
            if not jobs:
                continue
            began = time.monotonic()
            try:
                self._tick(jobs, model)
            except Exception:  # of this code, not of a client: the sessions of others must go on
                log.exception("A tick of the engine failed; its sessions are over.")
                for job in jobs:
                    self.close(job.session, "The server failed; begin again.")
            self._tick_s += _SMOOTHING * (time.monotonic() - began - self._tick_s)

    def _wait_for_others(self) -> None:
        """Wait for the frames of the other busy sessions, under the lock."""
        longest = min(self.settings.batch_wait_ms / 1000, self._tick_s / 2)
        until = time.monotonic() + longest
        while not self._closed:
            now = time.monotonic()
            busy = sum(now - last < BUSY_S for last in self._last_tick.values())
            if now >= until or len(self._ready) >= busy:
                return
            self._lock.wait(until - now)

    def _take(self) -> list[_Job]:
        """Take a frame of each session that has one, those first that waited longest."""
        jobs: list[_Job] = []
        rows = 0
        now = time.monotonic()
        for session in list(self._ready):
            rows += max(1, len(session.followed))
            if jobs and rows > self.settings.max_batch:
                break
            del self._ready[session]
            if session.has_work:
                jobs.append(_Job(session, session.take()))
                self._last_tick[session] = now
        return jobs

    def _tick(self, jobs: list[_Job], model: ServedModel) -> None:
        watch = self.statistics.watch
        with watch("decode"):
            self._decode_all(jobs)
        with watch("begin"):
            for job in jobs:
                self._begin(job, model)
        with watch("track"):
            self._track([job for job in jobs if job.failed is None], model)
        with watch("answer"):
            for job in jobs:
                self._answer(job)

    def _decode_all(self, jobs: list[_Job]) -> None:
        if len(jobs) == 1:  # a switch to another thread and back would cost more
            self._decode(jobs[0])
        else:
            list(self._decoders.map(self._decode, jobs))

    def _decode(self, job: _Job) -> None:
        with _alone(job):
            job.image = messages.decode(job.frame.data, job.frame.raw)

    def _begin(self, job: _Job, model: ServedModel) -> None:
        """Move the session to the present model, and add and drop its targets."""
        session = job.session
        if job.image is None:
            return
        with _alone(job):
            if session.model is not model:
                session.move(model)
                self.statistics.count("moved")
            job.new = session.obey(job.image, job.frame.commands)

    def _track(self, jobs: list[_Job], model: ServedModel) -> None:
        """Step all targets together; if that fails, those of each session by themselves."""
        rows = [(job, each) for job in jobs for each in job.rows]
        if not rows:
            return
        self.statistics.observe("batch", len(rows))
        try:
            boxes, scores = model.step(
                [each.target for _, each in rows], [_image(job) for job, _ in rows]
            )
        except Exception:
            if len(jobs) == 1:
                with _alone(jobs[0]):
                    raise
            else:
                for job in jobs:
                    self._track([job], model)
            return
        for (_, each), box, score in zip(rows, boxes.tolist(), scores.tolist(), strict=True):
            each.box, each.score = tuple(box), score

    def _answer(self, job: _Job) -> None:
        session, frame = job.session, job.frame
        if job.failed is not None:
            self.close(session, job.failed, refused=True)
            return
        took = time.monotonic() - frame.came
        answer = {
            "frame": frame.number,
            "targets": {
                name: {"box": messages.ltwh(each.box), "score": round(each.score, 4)}
                for name, each in session.followed.items()
            },
            "model": session.model.name,
            "skipped": frame.skipped,
            "ms": round(1000 * took, 2),
        }
        if session.ended is None:
            session.answer(answer)
        self.statistics.observe("frame", took)
        self.statistics.count("frames")
        self.statistics.count("skipped", frame.skipped)
        for observer in self._observers:
            try:
                observer(session, _image(job), answer)
            except Exception:  # what looks on must not end what it looks at
                log.exception("What observes the answers failed; the session goes on.")
        with self._lock:
            self._note(session)


@contextlib.contextmanager
def _alone(job: _Job) -> Iterator[None]:
    """Let what cannot be done with a frame end its own session, and no other of the tick."""
    try:
        yield
    except UserError as error:
        job.failed = str(error)
    except Exception:  # of this code, on an input that nobody thought of
        log.exception("A frame of the session %s could not be tracked.", job.session.id)
        job.failed = "The server failed at this frame; begin again."


def _image(job: _Job) -> np.ndarray:
    assert job.image is not None
    return job.image
