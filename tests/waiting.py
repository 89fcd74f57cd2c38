"""Wait for a condition, and say what was waited for when it does not come."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def wait_until(
    what: str,
    ready: Callable[[], T],
    *,
    process: subprocess.Popen[Any] | None = None,
    output: Callable[[], str] = str,
    seconds: float = 300.0,
) -> T:
    """Ask until the answer is true, and return it.

    Args:
        what: names the condition in the message.
        ready: the condition; asked once more after the process has ended.
        process: whose end leaves nothing to wait for.
        output: what helps to see why the condition does not come.
        seconds: many times what it takes on a machine that has nothing else to do.

    Raises:
        AssertionError: if it does not come true in time, or the process ends before.
    """
    deadline = time.monotonic() + seconds
    while True:
        ended = process is not None and process.poll() is not None
        answer = ready()
        if answer:
            return answer
        assert not ended, f"waited for {what}, but the process ended:\n{output()}"
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s\n{output()}"
        time.sleep(0.02)
