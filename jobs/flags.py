"""Flags of the jobs: typed by dataclasses, their errors one sentence, no secrets among them."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from lorat.errors import UserError
from lorat.files.addresses import refuse_secrets

T = TypeVar("T")


def parse(
    kind: Callable[..., T] | type[T],
    arguments: Sequence[str] | None = None,
    *,
    default: Any = tyro.MISSING_NONPROP,
    description: str | None = None,
) -> T:
    """Read the command line into ``kind``: a frozen dataclass, or a function of dataclasses.

    Raises:
        UserError: for an unknown flag, a value of the wrong type, or an address with a secret, in
            one sentence.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if description is not None:
        # Lines that begin with a letter would be joined; each example has its own.
        description = re.sub("\n+(?=python )", "\n  ", description)
    refuse_secrets_in(given)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=given, default=default, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_sentence(_plain(printed.getvalue()), kind)) from None


def refuse_secrets_in(arguments: Sequence[str]) -> None:
    """Refuse addresses with passwords and keys on a command line.

    Raises:
        UserError: for the first one.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, _, value = argument.partition("=")
        if name.startswith("-"):
            refuse_secrets(value, name)
        else:
            refuse_secrets(argument, before if before.startswith("-") else "The address")


def _plain(box: str) -> str:
    """Return the words of a printed box without its frame and colours, in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", box)
    return re.sub(r"\s+", " ", text).strip()


def _one_sentence(words: str, kind: Any) -> str:
    """Condense what the flag parser printed into one sentence: it gives errors in no other form."""
    unknown = re.search(r"Unrecognized (?:options|arguments): ([^,\s]+)", words)
    if unknown:
        flag = unknown.group(1).split("=")[0]
        if not flag.startswith("-"):
            return f"{flag} is no option; options start with --, and --help lists them all."
        close = difflib.get_close_matches(flag, _flags(kind), n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return f"There is no option {flag}; {hint}--help lists them all."
    for border in ("For full helptext", "Argument helptext", "Got errors"):
        words = words.split(border)[0].strip()
    words = re.sub(r"^.*?(?:Value error|Invalid choice|Missing argument) ", "", words)
    words = re.sub(r"^Error parsing [\w.]+: (?=.*;)", "", words)
    return words if ";" in words else f"{words.rstrip(chr(46))}; --help explains every option."


def _flags(kind: Any) -> list[str]:
    """List the long flags of a command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", printed.getvalue())))
