"""The one exception that a user is meant to read."""

import shutil


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence: what was given, what is allowed, what to do.  The jobs print
    it without a traceback and exit with code 2.
    """


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
