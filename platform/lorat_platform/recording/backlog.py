"""Journals that other processes of this machine left, and delivering them later."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import defaultdict
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
from lorat_platform.recording.trouble import recording_command, replay_command

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


def waiting_here() -> tuple[list[Path], int]:
    """List the waiting journals of the MLflow in use, and count those of other ones.

    A journal whose header cannot be read is among the former: delivering it says why.
    """
    here, store = [], store_name(tracking_uri())
    folders = waiting()
    for folder in folders:
        try:
            is_other = Journal(folder).header()["store"] != store
        except (UserError, OSError):
            is_other = False
        if not is_other:
            here.append(folder)
    return here, len(folders) - len(here)


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
        if left := len(journal.postponed()) + journal.console.is_ahead():
            raise UserError(
                f"{left} artefacts cannot be uploaded ({delivery.artifact_error}); mend that and "
                f"give '{replay_command(uri, folder)}' again."
            )
    forget(journal)
    return total - delivery.num_rejected


def deliver_quietly() -> None:
    """Deliver what earlier runs left for the MLflow in use, as far as it can be; never raises.

    Journals of other ones are no news to whoever runs this job; the list command has them.
    """
    try:
        folders, _ = waiting_here()
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
    """Run ``python -m lorat_platform.recording replay [FOLDER ...]`` or ``list``."""
    match arguments:
        case ["replay", *folders]:
            return _replay_all([Path(folder).absolute() for folder in folders])
        case ["list"]:
            return _list()
    print(f"usage: {recording_command()} replay [FOLDER ...] | list")
    print("replay  delivers what MLflow could not take, or refused, when it was recorded")
    print("list    shows what waits on this machine for this MLflow or another")
    return 2


def _replay_all(given: list[Path]) -> int:
    """Deliver the given journals, or all of the MLflow in use."""
    folders, num_others = (given, 0) if given else waiting_here()
    failed = 0
    for folder in folders:
        try:
            sent = replay(folder, rejected=True)
        except Exception as error:
            failed += 1
            print(f"error: {folder}: {first_line(error)}", file=sys.stderr)
        else:
            print(f"{folder}: " + ("still in use" if sent is None else f"{sent} records delivered"))
    if num_others:
        print(
            f"{num_others} {'journals wait' if num_others > 1 else 'journal waits'} for another "
            f"MLflow than {tracking_uri()}; listed by: {recording_command('list')}"
        )
    return 1 if failed else 0


def _list() -> int:
    """Print every waiting journal under the MLflow it waits for, and what delivers them."""
    rows: dict[str, list[str]] = defaultdict(list)
    failed = 0
    for folder in waiting():
        journal = Journal(folder)
        try:
            header, num_records = journal.header(), journal.num_pending()
        except (UserError, OSError) as error:
            failed += 1
            print(f"error: {folder}: {first_line(error)}", file=sys.stderr)
            continue
        run = f"{header['experiment']}/{header['name']}"
        rows[header["tracking_uri"]].append(f"  {num_records:6d} records  {run}  {folder}")
    for store in sorted(rows):
        print(f"MLflow at {store}", *rows[store], sep="\n")
        print(f"  delivered by: {replay_command(store)}")
    if not rows and not failed:
        print("Nothing waits on this machine.")
    return 1 if failed else 0
