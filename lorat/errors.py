"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence: what was given, what is allowed, what to do.  The jobs print
    it without a traceback and exit with code 2.
    """
