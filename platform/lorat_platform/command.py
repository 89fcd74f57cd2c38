"""The habits of every job: typed flags, one-sentence errors, exit codes, clean stops."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from lorat.errors import UserError
from lorat.home import home, home_problem

log = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130


def parse(
    kind: Callable[..., T] | type[T],
    arguments: Sequence[str] | None = None,
    *,
    default: Any = tyro.MISSING_NONPROP,
    description: str | None = None,
) -> T:
    """Read the command line into ``kind``: a frozen dataclass, or a function of dataclasses.

    Raises:
        UserError: for an unknown flag or a value of the wrong type, in one sentence.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=given, default=default, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_sentence(_plain(printed.getvalue()), kind)) from None


def _plain(box: str) -> str:
    """Return the words of a printed box without its frame and colours, in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", box)
    return re.sub(r"\s+", " ", text).strip()


def _one_sentence(words: str, kind: Any) -> str:
    """Condense what the flag parser printed into one sentence."""
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


def flag(field: str) -> str:
    """Return the option of a field on the command line."""
    return f"--{field.replace('_', '-')}"


def run(main: Callable[[], int | None]) -> None:
    """Run a job and leave the process with its exit code.

    A :class:`UserError`, also one raised in a Ray worker, and whatever comes of a home folder that
    cannot be written become ``error: one sentence`` and code 2; an interrupt becomes code 130;
    anything else keeps its traceback and code 1.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in ("ray", "mlflow", "alembic", "urllib3", "botocore", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # its import sets its logger again
    try:
        _sweep_left_overs()
        code = main() or 0
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except Exception as error:
        message = user_message(error) or out_of_memory_message(error) or home_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = EXIT_USER_ERROR
    finally:
        _leave_ray()
    sys.stdout.flush()
    if code == EXIT_INTERRUPTED:
        # Threads that wait for the cluster must neither hold the process up nor change its code.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _sweep_left_overs() -> None:
    """Remove what killed jobs left, as far as that can be; it stops no job."""
    from lorat_platform import left_overs

    try:
        left_overs.sweep()
    except (OSError, UserError) as error:
        log.warning("What killed jobs left on this machine cannot be removed: %s", error)


def _leave_ray() -> None:
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            ray.shutdown()


def user_message(error: BaseException | None, depth: int = 0) -> str | None:
    """Return the sentence of the user error that ``error`` is or wraps, or none.

    Ray wraps what a task raised in several layers: task errors have ``cause``, worker groups
    ``worker_failures``, controllers ``controller_failure``, user exceptions ``_base_exc``.
    """
    if error is None or depth > 12:
        return None
    if isinstance(error, UserError):
        return str(error).strip().splitlines()[0]
    failures = getattr(error, "worker_failures", None)
    inner: list[Any] = list(failures.values()) if isinstance(failures, dict) else []
    inner += [
        getattr(error, name, None)
        for name in ("cause", "controller_failure", "_base_exc", "__cause__", "__context__")
    ]
    for wrapped in inner:
        if isinstance(wrapped, BaseException):
            message = user_message(wrapped, depth + 1)
            if message is not None:
                return message
    # What an actor raised while it was made is only kept as text.
    named = re.search(r"^lorat\.errors\.UserError: (.+)$", str(error), re.MULTILINE)
    return named.group(1) if named else None


def out_of_memory_message(error: BaseException) -> str | None:
    """Return a sentence if Ray ended a process because memory ran out, else none."""
    if "OutOfMemoryError" not in type(error).__name__ and "low on memory" not in str(error):
        return None
    return (
        "A machine of the cluster ran out of memory and Ray ended a process; use fewer or smaller "
        "workers, or a machine with more memory."
    )


def home_message(error: BaseException) -> str | None:
    """Return a sentence if the home folder, which most jobs need, cannot be written, else none."""
    problem = home_problem()
    if problem is None:
        return None
    lines = str(error).strip().splitlines()
    return (
        f"The home folder {home()} cannot be written ({problem}), which stopped the job "
        f"({type(error).__name__}: {lines[0][:200] if lines else ''}); set LORAT_HOME to a folder "
        "that can."
    )


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
