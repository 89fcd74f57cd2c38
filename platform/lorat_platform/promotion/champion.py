"""Moving the alias ``champion``: under a lock, with a history, and with the reasons recorded.

An alias points at one version and is moved in one step, so there is never a moment with two
champions or none.  The lock makes promotions take turns, so that a candidate is never compared
with a champion that has been replaced meanwhile.  MLflow sets an alias without comparing what it
was: of two promotions that set it and read it again, the earlier may read its own before the later
sets the other, and both would write themselves into the history.  A registered model, made as the
lock, is what a server refuses to make twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorat.config.json_files import parse_json
from lorat.errors import UserError
from lorat_platform.recording.store import connect
from lorat_platform.registry.versions import CHAMPION, MODEL_NAME

log = logging.getLogger(__name__)

PREVIOUS = "previous"
"""Alias of the version that was champion before."""
HISTORY_TAG = "champion_history"
"""Tag of the registered model: JSON list of the champions, the present one last."""
HISTORY_LENGTH = 50
"""Champions kept on record; MLflow on PostgreSQL takes 5000 characters in a tag."""
_HELD = {
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",  # given back before MLflow had composed its answer
    "TEMPORARILY_UNAVAILABLE",  # the store is busy
}
"""Errors on which taking the lock is tried again."""
LOCK_STALE_S = 300.0
"""Age after which a lock counts as left by a dead process; the locked part takes about 20 calls,
each of up to 10 s with a slow server."""
LOCK_WAIT_S = 600.0
"""Longest wait for the lock."""


def champion_of(client: Any, name: str = MODEL_NAME) -> str | None:
    """Return the version that is champion now, or none."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException as error:
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            return None
        raise


def history_of(client: Any, name: str = MODEL_NAME) -> list[dict[str, Any]]:
    """Return the recorded champions, the latest last."""
    text = client.get_registered_model(name).tags.get(HISTORY_TAG, "[]")
    return parse_json(
        text, f"The tag {HISTORY_TAG} of {name}", "correct or delete it in MLflow", shape=[dict]
    )


def promote(
    name: str,
    version: str,
    *,
    expected_champion: str | None,
    tags: Mapping[str, Any],
    by: str,
) -> bool:
    """Make a version champion, unless the champion has changed since it was compared.

    Args:
        name: registered model.
        version: the new champion.
        expected_champion: the version it was compared with; none if there was none.
        tags: decision and numbers, set on the version.
        by: how it came about, such as ``gate`` or ``force``.

    Returns:
        False if another promotion was faster; compare again with the new champion then.
    """
    client = connect()
    with locked(client, name) as still_locked:
        present = champion_of(client, name)
        if present != expected_champion:
            return False
        # Killed anywhere in here, the history holds only versions that were champion: the present
        # one before the alias moves, and the new one after it.
        history = _with(history_of(client, name), present, by="alias")
        _write_history(client, name, history)
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, str(value))
        if not still_locked():
            return False
        client.set_registered_model_alias(name, CHAMPION, version)
        _write_history(client, name, _with(history, version, by=by))
        if present is not None and present != version:
            client.set_registered_model_alias(name, PREVIOUS, present)
    return True


def roll_back(name: str = MODEL_NAME, *, tags: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Make the previous champion champion again; return the old and the new version.

    Args:
        name: registered model.
        tags: who and why, set on the version that is champion no longer.

    Raises:
        UserError: if there is no champion, or none before it that still exists.
    """
    client = connect()
    with locked(client, name):
        present = champion_of(client, name)
        if present is None:
            raise UserError(f"{name} has no champion, so there is nothing to roll back.")
        history = [
            entry
            for entry in _with(history_of(client, name), present, by="alias")[:-1]
            if _exists(client, name, entry["version"])
        ]
        while history and history[-1]["version"] == present:
            history.pop()
        if not history:
            raise UserError(
                f"No champion before version {present} of {name} is on record; set the alias "
                "in the UI, or promote a version with --force."
            )
        version = history[-1]["version"]
        # Before the alias moves: after it, the version that is left would count as the one before.
        _write_history(client, name, history)
        for key, value in ({"rolled_back": _now()} | dict(tags or {})).items():
            client.set_model_version_tag(name, present, key, str(value))
        client.set_registered_model_alias(name, CHAMPION, version)
        if len(history) > 1:
            client.set_registered_model_alias(name, PREVIOUS, history[-2]["version"])
        else:
            client.delete_registered_model_alias(name, PREVIOUS)
    return present, version


def _write_history(client: Any, name: str, history: list[dict[str, Any]]) -> None:
    client.set_registered_model_tag(name, HISTORY_TAG, json.dumps(history))


def _with(history: list[dict[str, Any]], version: str | None, *, by: str) -> list[dict[str, Any]]:
    """Append a champion, unless it is the last one on record.

    A champion set by hand in the UI is not on record yet when the next promotion sees it.
    """
    if version is None or (history and history[-1]["version"] == version):
        return history
    return [*history, {"version": version, "at": _now(), "by": by}][-HISTORY_LENGTH:]


def _exists(client: Any, name: str, version: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextlib.contextmanager
def locked(
    client: Any, name: str, *, timeout_s: float = LOCK_WAIT_S
) -> Iterator[Callable[[], bool]]:
    """Hold the promotion lock of a registered model; yields what tells whether it is still held.

    The lock is a registered model of its own: making one is the operation of MLflow that exactly
    one of many callers can do, on any store.

    Raises:
        UserError: if the lock cannot be had in time.
    """
    from mlflow.exceptions import MlflowException

    lock, owner = f"{name}.promotion-lock", uuid.uuid4().hex
    about = f"Held while the champion of {name} changes, by {socket.gethostname()}:{os.getpid()}."
    deadline = time.monotonic() + timeout_s
    broken: list[str] = []
    while True:
        try:
            client.create_registered_model(lock, tags={"owner": owner}, description=about)
            break
        except MlflowException as error:
            if error.error_code not in _HELD:
                raise
        broken += _break_stale(client, lock)
        if time.monotonic() > deadline:
            raise UserError(
                f"Another promotion holds {lock} for {timeout_s:.0f} s; end it, or delete that "
                "registered model in the UI."
            )
        time.sleep(0.2)

    def still_locked() -> bool:
        return _owner(client, lock) == owner

    try:
        yield still_locked
    finally:
        with contextlib.suppress(MlflowException):
            if still_locked():  # not broken by another one as stale
                client.delete_registered_model(lock)
            for aside in broken:
                client.delete_registered_model(aside)


def _owner(client: Any, lock: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(lock).tags.get("owner")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _break_stale(client: Any, lock: str) -> list[str]:
    """Move a lock that a dead process left out of the way; return its new name, to be deleted.

    The new name says whose lock it was, so that of several who find it stale only one can move
    it, and none of them the lock that the first one takes next.
    """
    from mlflow.exceptions import MlflowException

    try:
        held = client.get_registered_model(lock)
        age_s = time.time() - held.creation_timestamp / 1000
        if age_s <= LOCK_STALE_S or _owner(client, lock) != held.tags.get("owner"):
            return []
        aside = f"{lock}.broken-{held.tags.get('owner')}"
        client.rename_registered_model(lock, aside)
    except MlflowException as error:
        if error.error_code not in _HELD:
            raise
        return []
    log.warning("Broke the promotion lock %s, %.0f s old.", lock, age_s)
    return [aside]
