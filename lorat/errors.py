"""The one exception that a user is meant to read."""

import os
import re
import shutil


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence: what was given, what is allowed, what to do.  The jobs print
    it without a traceback and exit with code 2.
    """


def named(path: str | os.PathLike[str]) -> str:
    """Return a path as it is shown: what cannot be printed in one line is escaped."""
    text = without_surrogates(os.fspath(path))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_surrogates(text: str) -> str:
    """Escape what no encoding can print: bytes of file names that are no text, and halves of pairs.

    A byte becomes ``\\xfc``, as Python writes it.
    """
    return re.sub("[\ud800-\udfff]", lambda m: _escaped(ord(m[0])), text)


def _escaped(code: int) -> str:
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def cannot_read(path: object, error: OSError) -> UserError:
    """Make the error for a file or folder that is there and cannot be read.

    Args:
        path: of the file or folder.
        error: what the system said; where this user may not read it, that is said.
    """
    if isinstance(error, PermissionError):
        return UserError(
            f"{path} may not be read by this user ({reason(error)}); let its owner allow it "
            "(chmod a+rX), or give another."
        )
    return UserError(f"{path} cannot be read ({reason(error)}); mend that or give another.")


def reason(error: BaseException) -> str:
    """Return the cause of a storage error in a few words."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
