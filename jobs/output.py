"""What a process prints, without the secrets of addresses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from lorat.errors import without_surrogates
from lorat.files.addresses import without_secrets


class CleanStream:
    """A text stream that leaves passwords and keys out of what it passes on to another.

    Bytes of file names that are no text are escaped.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without the secrets in it."""
        self._stream.write(without_surrogates(without_secrets(text)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts in order."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def cleaned_output() -> Iterator[None]:
    """Let everything that Python prints go through :class:`CleanStream`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (CleanStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
