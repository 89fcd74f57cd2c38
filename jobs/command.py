"""The habits of every job: typed flags, one-sentence errors, exit codes, clean stops."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from output import cleaned_output

from lorat.errors import UserError
from lorat.files.addresses import refuse_secrets
from lorat_platform.cluster.interrupts import EXIT_INTERRUPTED, interruptible, leave_at_once
from lorat_platform.failures import home_message, surroundings_message, user_message

log = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
ADDRESSES = (
    "LORAT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "RAY_ADDRESS",
)  # fmt: skip
"""Variables that name a place; what is secret about it belongs into others."""


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


def run(main: Callable[[], int | None]) -> None:
    """Run a job and leave the process with its exit code.

    A :class:`UserError`, also one raised in a Ray worker, an error of the machine or its files and
    whatever comes of a home folder that cannot be written become ``error: one sentence`` and code
    2; an interrupt or a request to end becomes code 130; anything else keeps its traceback and code
    1.  Nothing is printed with the secrets of addresses.
    """
    with interruptible() as interrupted, cleaned_output():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        for name in ("ray", "mlflow", "alembic", "urllib3", "botocore", "httpx"):
            logging.getLogger(name).setLevel(logging.WARNING)
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # its import sets its logger again
        try:
            code = _exit_code(main, interrupted)
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            code = EXIT_INTERRUPTED
        if code == EXIT_INTERRUPTED:
            # Threads that wait for the cluster must not hold the process up nor change its code.
            leave_at_once()
        sys.stdout.flush()
    sys.exit(code)


def _exit_code(main: Callable[[], int | None], interrupted: Callable[[], bool]) -> int:
    try:
        for name in ADDRESSES:
            refuse_secrets(os.environ.get(name, ""), name)
        _sweep_left_overs()
        return main() or 0
    except Exception as error:
        if interrupted():  # the stop is the cause, as where Ray's processes were stopped as well
            raise KeyboardInterrupt from error
        message = user_message(error) or home_message(error) or surroundings_message(error)
        if message is None:
            traceback.print_exc()
            return EXIT_FAILURE
        print(f"error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        _leave_ray()


def _sweep_left_overs() -> None:
    """Remove what killed jobs left, as far as that can be; it stops no job."""
    import left_overs

    try:
        left_overs.sweep()
    except (OSError, UserError) as error:
        log.warning("What killed jobs left on this machine cannot be removed: %s", error)


def _leave_ray() -> None:
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            ray.shutdown()


def git_revision(folder: str | os.PathLike[str]) -> str | None:
    """Return the git revision of a checkout, with ``-dirty`` for local changes, or none."""
    import subprocess

    try:
        result = subprocess.run(
            ["git", "-C", os.fspath(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
