"""SHA-256 of the files of a folder, noted in it as ``sha256sum`` writes them.

``sha256sum --check SHA256SUMS`` compares them without this program.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from pathlib import Path

from lorat.errors import UserError
from lorat.files.scratch import whole_file

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def seal(folder: Path, *names: str) -> None:
    """Note the checksums of files that were just written, beside those that are there.

    Args:
        folder: receives ``SHA256SUMS``.
        names: of the files, relative to the folder.
    """
    try:
        sums = _read(folder)
    except UserError:  # of files that are written anew now
        sums = {}
    sums = {name: digest for name, digest in sums.items() if (folder / name).is_file()}
    sums |= {name: sha256_of(folder / name) for name in names}
    with whole_file(folder / SUMS) as part:
        part.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def check(folder: Path, *names: str) -> None:
    """Compare files with what was written.

    A folder without checksums was written by an earlier version: that is said in the log.

    Args:
        folder: that :func:`seal` was given.
        names: of the files to compare; none means all that are noted.

    Raises:
        UserError: if a file has another content, is missing, or none of its checksum is noted.
    """
    if not (folder / SUMS).exists():
        _say_unchecked(folder)
        return
    sums = _read(folder)
    for name in names or sums:
        file = folder / name
        if name not in sums:
            problem = f"{SUMS} beside it does not list it"
        elif not file.is_file():
            problem = "it is missing"
        elif sha256_of(file) != sums[name]:
            problem = f"its SHA-256 is not the one in {SUMS}"
        else:
            continue
        raise UserError(
            f"{file} is damaged: {problem}; restore that folder, or delete it and use another "
            "checkpoint."
        )


def check_file(file: Path) -> None:
    """Compare a single file with the checksums beside it, where they list it.

    Raises:
        UserError: if it has another content.
    """
    if file.name in _read(file.parent):
        check(file.parent, file.name)


@functools.cache
def _say_unchecked(folder: Path) -> None:
    log.warning("%s carries no checksums (%s); damage of it cannot be told.", folder, SUMS)


def is_intact(folder: Path) -> bool:
    """Tell whether all files of a folder are what was written, as far as that is noted."""
    try:
        check(folder)
    except UserError:
        return False
    return True


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(folder: Path) -> dict[str, str]:
    """Return the noted checksums by name; none where there is no file of them."""
    file = folder / SUMS
    if not file.exists():
        return {}
    lines = file.read_bytes().decode(errors="replace").splitlines()
    matches = [_LINE.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match}
    if len(sums) < len(lines) or any(".." in name or name.startswith("/") for name in sums):
        raise UserError(
            f"{file} is damaged; restore that folder, or delete it and use another checkpoint."
        )
    return sums
