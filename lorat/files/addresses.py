"""Secrets in addresses: refused where an address is given, cut out of what is shown or kept.

An address is printed, stored with every run and checkpoint, and seen in the list of processes; the
environment and the files for credentials are not.
"""

from __future__ import annotations

import re
import urllib.parse

from lorat.errors import UserError

_USER = re.compile(
    r"""(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*)://
        (?P<user>
            [^\s/?\#@:\["'<>]*:(?!\d{1,5}(?:[/?\#\s"'<>]|$))[^\s@"'<>]*@ # with a password, even one
            (?:[^\s/?\#@"'<>]*@)?                                        # that has a slash or an @
          | [^\s/?\#@:\["'<>]+@
        )""",
    re.VERBOSE,
)
"""The user and password of an address; a number before a path is a port."""
_PARAMETER = re.compile(
    r"""(?P<name>[?&;\#]
            (?:[\w.%-]*(?:secret|token|passw|passphrase|pwd|access[_-]?key|api[_-]?key
                |private[_-]?key|credential|signature)[\w.%-]*|sig|auth)
        =)[^&\s\#"'<>,;]+""",
    re.VERBOSE | re.IGNORECASE,
)
"""A parameter of an address whose name says that it is secret."""
_USERS_ARE_KEYS = {"s3", "s3a", "gs", "gcs", "http", "https"}
"""Schemes where a user without a password is a key or a token as well."""
_PLACES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the name of a file",
    "http": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for MLflow, or "
    "~/.mlflow/credentials",
    "postgresql": "PGPASSWORD, or ~/.pgpass",
    "mysql": "an option file, named by ?read_default_file=",
}
"""Where a secret belongs, by the beginning of the scheme."""


def without_secrets(text: str) -> str:
    """Return a text without the passwords and keys of all addresses in it."""
    if "://" not in text and "=" not in text:
        return text
    text = _USER.sub(lambda m: f"{m['scheme']}://" if _is_secret(m) else m[0], text)
    return _PARAMETER.sub(r"\g<name>***", text)


def refuse_secrets(address: str, what: str) -> None:
    """Refuse an address, or a text with addresses, that has a password or key in it.

    Args:
        address: as given.
        what: what was given, for the message.

    Raises:
        UserError: if it has; the message says where such things belong and does not repeat them.
    """
    for text in (address, urllib.parse.unquote(address)):
        shown = without_secrets(text)
        if shown == text:
            continue
        schemes = re.findall(r"([A-Za-z0-9+.-]+)://", shown)
        places = [p for known, p in _PLACES.items() if any(s.startswith(known) for s in schemes)]
        where = f" ({'; '.join(places)})" if places else ""
        raise UserError(
            f"{what} {shown} was given with a password or key in it, where others can read it; "
            "give the address alone, and the secret in the environment or a file for credentials"
            f"{where}."
        )


def _is_secret(match: re.Match[str]) -> bool:
    user = match["user"].rstrip("@")
    if user == "anonymous":  # how public buckets are read
        return False
    return ":" in user or match["scheme"].lower() in _USERS_ARE_KEYS
