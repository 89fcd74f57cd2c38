"""Places to write to, looked at before the work whose results they will hold."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorat.errors import UserError, named, reason, without_surrogates


def check_file(file: Path) -> None:
    """Refuse a path at which no file can be written; nothing is made.

    Raises:
        UserError: for a folder, a name that no file can have, and as :func:`check_folder`.
    """
    if os.path.isdir(file):
        raise UserError(f"{named(file)} is a folder; give the name of a file.")
    check_folder(file.parent, below=file.name)


def check_folder(folder: Path, *, below: str = "") -> None:
    """Refuse a path at which no folder can be made or written into; nothing is made.

    Args:
        folder: may be missing, and so may those above it.
        below: what will be made in it.

    Raises:
        UserError: if one of the folders is a file, may not be written, or has a name that is too
            long.
    """
    there, missing = Path(os.path.abspath(folder)), [below] if below else []
    while not os.path.lexists(there):
        missing.append(there.name)
        there = there.parent
    if not os.path.isdir(there):
        raise UserError(
            f"{named(folder)} cannot be a folder: {named(there)} is none; give another place."
        )
    for name in missing:
        try:
            os.lstat(there / name)
        except FileNotFoundError:
            continue
        except OSError as error:  # such as a name that is too long
            raise _cannot_write(folder / below, error) from error
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _cannot_write(folder / below, error) from error


@contextlib.contextmanager
def as_text(folder: Path) -> Iterator[Path]:
    """Yield a path of a folder that is there for libraries that take no name but UTF-8.

    It holds for this process, within the block.
    """
    if str(folder) == without_surrogates(str(folder)):
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{named(path)} cannot be written ({reason(error)}); give another place.")
