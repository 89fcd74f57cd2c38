"""The habits of every job: one-sentence errors, exit codes, clean stops."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable

from loading import LOADING
from output import cleaned_output

from lorat.errors import UserError
from lorat.files.addresses import refuse_secrets
from lorat_platform.cluster.interrupts import EXIT_INTERRUPTED, interruptible, leave_at_once
from lorat_platform.failures import home_message, surroundings_message, user_message
from lorat_platform.recording.console_log import listen

log = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
ADDRESSES = (
    "LORAT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "RAY_ADDRESS",
)  # fmt: skip
"""Variables that name a place; what is secret about it belongs into others."""


def run(main: Callable[[], int | None], *, goes_on: bool = False) -> None:
    """Run a job and leave the process with its exit code.

    Args:
        main: the job.
        goes_on: an interrupted job goes on when the same command is given again, which is said.

    A :class:`UserError`, also one raised in a Ray worker, an error of the machine or its files and
    whatever comes of a home folder that cannot be written become ``error: one sentence`` and code
    2; an interrupt or a request to end becomes code 130; anything else keeps its traceback and code
    1.  Nothing is printed with the secrets of addresses.
    """
    LOADING.end()
    with interruptible() as interrupted, cleaned_output():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        listen()
        for name in ("ray", "mlflow", "alembic", "urllib3", "botocore", "httpx"):
            logging.getLogger(name).setLevel(logging.WARNING)
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # its import sets its logger again
        try:
            code = _exit_code(main, interrupted)
        except KeyboardInterrupt:
            how = f" This goes on from here: {_same_command()}" if goes_on else ""
            print(f"\nInterrupted.{how}", file=sys.stderr)
            code = EXIT_INTERRUPTED
        if code == EXIT_INTERRUPTED:
            # Threads that wait for the cluster must not hold the process up nor change its code.
            leave_at_once()
        sys.stdout.flush()
    sys.exit(code)


def _same_command() -> str:
    """Return the command that was given, but for what would make it begin anew."""
    given = ["python", *sys.argv]
    for place, word in enumerate(given):
        if word == "--resume=never":
            given[place] = "--resume=auto"
        elif word == "never" and given[place - 1] == "--resume":
            given[place] = "auto"
    return shlex.join(given)


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
            ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
