"""Ctrl-C and requests to end (SIGTERM): the same in every job, at any moment of it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Raise ``KeyboardInterrupt`` for both signals; another one, while that is dealt with, ends.

    A signal that is ignored, as Ctrl-C behind ``nohup`` or ``&``, stays so.  Yields what tells
    whether a signal came.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            leave_at_once()
        interrupted = True
        raise KeyboardInterrupt

    def end(number: int, frame: FrameType | None) -> None:
        # Whoever deals with Ctrl-C at the moment, as Ray Tune does, deals with this as well.
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else interrupt)(number, frame)

    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: end}
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handlers[number]) for number in heard}
    try:
        yield lambda: interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Have the same handlers after a call that installs others, as ``ray.init`` does."""
    before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) is not None}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    try:
        yield
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:  # what Ray's handler makes of it
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_at_once() -> None:
    """End this process as an interrupted one, without waiting for any thread of it."""
    with contextlib.suppress(Exception):  # a reader that is gone, or a write that was cut short
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)
