"""What goes on while a person waits: a line for each phase, and more as long as it lasts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Self

log = logging.getLogger(__name__)

STILL_S = 10.0
"""Longest silence within a phase."""


class Phases:
    """Says which phase of a job goes on, and every :data:`STILL_S` for how long it has.

    A thread does that, so that a phase may be one call that blocks.

    Args:
        say: takes the lines; none means the log.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._say = say or log.info
        self._changed = threading.Condition()
        self._text = ""
        self._every_s = STILL_S
        self._began = self._said = 0.0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, text: str, *, every_s: float = STILL_S, quiet: bool = False) -> None:
        """Go over to a phase and say so; nothing happens if it goes on already.

        Args:
            text: what is done, such as ``building the model``.
            every_s: seconds between two lines about it.
            quiet: say it only once it lasts.
        """
        with self._changed:
            if text == self._text:
                return
            self._text, self._every_s = text, every_s
            self._began = self._said = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._repeat, name="phases", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            if not quiet:
                self._say(text)

    def end(self) -> None:
        """Let nothing go on that has to be said."""
        with self._changed:
            self._text = ""
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def _repeat(self) -> None:
        with self._changed:
            while self._thread is threading.current_thread():
                left_s = self._said + self._every_s - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                    continue
                self._said = time.monotonic()
                self._say(f"still {self._text}, {self._said - self._began:.0f} s")
