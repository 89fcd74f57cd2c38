"""Journals that other processes of this machine left, and delivering them later."""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path

import tenacity

from lorat.config.json_files import read_json, write_json
from lorat.errors import UserError
from lorat.files.home import home
from lorat_platform.recording.delivery import (
    DOUBTFUL_ATTEMPTS,
    Delivery,
    first_line,
    is_doubtful,
)
from lorat_platform.recording.journal import Journal
from lorat_platform.recording.store import tracking_uri
from lorat_platform.recording.trouble import replay_command

log = logging.getLogger(__name__)


def store_name(uri: str) -> str:
    """Return the short name under which a run's folder keeps the journal for a store."""
    return hashlib.sha256(uri.encode()).hexdigest()[:8]


def remember(journal: Journal) -> None:
    """Note that a journal may hold undelivered records."""
    path = _entry(journal)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({"journal": str(journal.folder)}, path)


def forget(journal: Journal) -> None:
    """Note that everything of a journal is delivered."""
    _entry(journal).unlink(missing_ok=True)


def _folder() -> Path:
    return home() / "journals" / "waiting"


def _entry(journal: Journal) -> Path:
    name = hashlib.sha256(str(journal.folder).encode()).hexdigest()[:16]
    return _folder() / f"{name}.json"


def waiting() -> list[Path]:
    """List the journals of this machine that may hold undelivered records."""
    folders = []
    for entry in sorted(_folder().glob("*.json")):
        try:
            folder = Path(read_json(entry, "delete it", shape={"journal": str})["journal"])
        except UserError as error:
            if entry.exists():  # else its run has just delivered everything
                log.warning("%s", error)
            continue
        if (folder / "run.json").exists():
            folders.append(folder)
        else:
            entry.unlink(missing_ok=True)  # the run's folder was deleted
    return folders


def replay(folder: Path, *, rejected: bool = False) -> int | None:
    """Deliver what a journal still holds and return the number of records.

    None means that the journal is left alone, since its process is still alive.

    Args:
        folder: of the journal.
        rejected: also send again what MLflow refused before.

    Raises:
        UserError: if there is no journal, it belongs to another MLflow store, or an artefact of it
            cannot be uploaded.
        Exception: if MLflow does not take the records; they stay in the journal.
    """
    if not (folder / "run.json").exists():
        raise UserError(f"There is no journal in {folder}; give a folder that has a run.json.")
    journal = Journal(folder)
    header = journal.header()
    uri = tracking_uri()
    if store_name(uri) != header["store"]:
        raise UserError(
            f"The journal in {folder} belongs to {header['tracking_uri']} but MLflow is "
            f"{uri}; set MLFLOW_TRACKING_URI."
        )
    with journal.owned() as mine:
        if not mine:
            return None
        if rejected:
            journal.take_up_rejected()
        delivery = Delivery(journal, uri)
        step = tenacity.Retrying(
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
            stop=tenacity.stop_after_attempt(DOUBTFUL_ATTEMPTS),
            retry=tenacity.retry_if_exception(is_doubtful),
            reraise=True,
        )
        total = 0
        while sent := step(delivery.step):
            total += sent
        if left := len(journal.postponed()):
            raise UserError(
                f"{left} artefacts cannot be uploaded ({delivery.artifact_error}); mend that and "
                f"give '{replay_command(folder)}' again."
            )
    forget(journal)
    return total - delivery.num_rejected


def deliver_quietly() -> None:
    """Deliver what earlier runs left, as far as it can be; never raises."""
    try:
        folders = waiting()
    except Exception as error:
        log.info("The journals of earlier runs cannot be listed: %s", error)
        return
    for folder in folders:
        try:
            sent = replay(folder)
        except Exception as error:
            log.info("%s stays as it is: %s", folder, error)
        else:
            if sent:
                log.warning("Delivered %d records that an earlier run left in %s.", sent, folder)


def main(arguments: list[str]) -> int:
    """Run ``python -m lorat_platform.recording replay [FOLDER ...]``."""
    if not arguments or arguments[0] != "replay":
        print(f"usage: {replay_command()} [FOLDER ...]")
        print("Delivers what MLflow could not take, or refused, when it was recorded.")
        return 2
    failed = 0
    for folder in [Path(a).absolute() for a in arguments[1:]] or waiting():
        try:
            sent = replay(folder, rejected=True)
        except Exception as error:
            failed += 1
            print(f"error: {folder}: {first_line(error)}", file=sys.stderr)
        else:
            print(f"{folder}: " + ("still in use" if sent is None else f"{sent} records delivered"))
    return 1 if failed else 0
