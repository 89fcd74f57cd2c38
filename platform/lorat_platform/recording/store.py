"""Which MLflow store is used, and a client that never waits for long."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import shlex
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorat.errors import UserError, named, without_surrogates
from lorat.files.addresses import refuse_secrets
from lorat.files.home import home

if TYPE_CHECKING:
    from mlflow import MlflowClient

REQUEST_RETRIES = "1"
"""Retries inside one MLflow call (the default of 7 blocks for 97 s); the sender repeats anyway."""
REQUEST_TIMEOUT_S = "60"
"""Longest wait for one answer; a server that needs 10 s per call still works."""

CONNECT_S = 5.0
"""Longest wait for a server to take a connection."""
ANSWER_S = 12.0
"""Longest wait for its first answer, where nothing can be done without it."""
_SQLITE = b"SQLite format 3\0"
"""What such a file begins with; an empty one is a new database."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Says that an experiment is of trained models.  Its pages show what their address asks for."""


def tracking_uri() -> str:
    """Return ``MLFLOW_TRACKING_URI``, or the SQLite file ``mlflow.db`` in the home folder.

    Raises:
        UserError: if it has a secret in it.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(home().absolute() / "mlflow.db")
    refuse_secrets(uri, "MLFLOW_TRACKING_URI")
    return uri


def is_sqlite(uri: str) -> bool:
    """Tell whether the store is a file that only one machine should write."""
    return re.match(r"sqlite(\+\w+)?:", uri) is not None


def sqlite_uri(file: Path) -> str:
    """Return the address of a SQLite file.

    Raises:
        UserError: for a path that is no text; SQLAlchemy has none for it.
    """
    path = str(file)
    if path != without_surrogates(path):
        raise UserError(
            f"{named(file)} has bytes in its name that are no text, which MLflow cannot open; set "
            "LORAT_HOME to another folder, or MLFLOW_TRACKING_URI."
        )
    escaped = re.sub(r"[%?]", lambda m: f"%{ord(m[0]):02X}", path)
    # For the plain scheme, MLflow makes the folder that an escaped path seems to name.
    return f"{'sqlite' if escaped == path else 'sqlite+pysqlite'}:///{escaped}"


def sqlite_file(uri: str) -> Path:
    """Return the file that the address of a SQLite store means, as SQLAlchemy reads it."""
    path = uri.partition(":///")[2].partition("?")[0]
    return Path(urllib.parse.unquote(path)).absolute()


def artifact_location(uri: str, experiment: str) -> str | None:
    """Return the artefact folder of a new experiment; none leaves it to the server.

    A SQLite store keeps them in ``mlartifacts`` beside the file, wherever the job was started.
    """
    if not is_sqlite(uri):
        return None
    folder = sqlite_file(uri).parent / "mlartifacts"
    # A name such as ".." would be another folder.
    return (folder / (re.sub(r"[^\w.-]+", "-", experiment).lstrip(".") or "-")).as_uri()


def connect(uri: str | None = None) -> MlflowClient:
    """Return a client; importing MLflow takes 2 to 3 s, so it happens here and not above.

    Pickled models are refused in this process from here on.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", REQUEST_RETRIES)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", REQUEST_TIMEOUT_S)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when MLflow is imported
    # Its own lines lead to the view of language models; jobs print addresses of theirs.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    from mlflow import MlflowClient

    uri = uri or tracking_uri()
    if is_sqlite(uri):
        _make_database(sqlite_file(uri))
        _check_database(sqlite_file(uri))
    return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI", uri))


@contextlib.contextmanager
def needing_mlflow() -> Iterator[None]:
    """Say in a sentence that MLflow does not answer, where nothing can be done without it.

    Raises:
        UserError: in place of MLflow's own error.
    """
    from mlflow.exceptions import MlflowException

    where = tracking_uri()
    check_answers(where)
    try:
        yield
    except (MlflowException, TimeoutError) as error:
        raise unusable_store(error, where) or UserError(
            f"MLflow at {where} did not do it ({str(error).splitlines()[0][:200]}); correct "
            "MLFLOW_TRACKING_URI or start the server, and give the same command again."
        ) from error


@functools.cache
def check_answers(uri: str) -> None:
    """Look whether MLflow answers, and answers this user, within some 15 s; once in a process.

    Args:
        uri: of the store; one that is no server is left to MLflow.

    Raises:
        UserError: that says what is wrong there.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    host = parts.hostname or ""
    if parts.scheme not in urllib.request.getproxies() or urllib.request.proxy_bypass(host):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()
        except OSError as error:
            why = error.strerror or f"nothing came from there for {CONNECT_S:.0f} s"
            raise _no_mlflow(uri, why) from error
    from mlflow.exceptions import MlflowException

    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    client = connect(uri)
    before = {name: os.environ[name] for name in names}  # what connect has set, or the user
    os.environ |= dict(zip(names, ("0", f"{ANSWER_S:.0f}"), strict=True))
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        if unusable := unusable_store(error, uri):
            raise unusable from error
        reason = str(error).splitlines()[0][:200].rstrip(".:")
        if "timed out" in str(error).lower():
            reason = f"it takes the connection and says nothing for {ANSWER_S:.0f} s"
        raise _no_mlflow(uri, reason) from error
    finally:
        os.environ |= before


def _no_mlflow(uri: str, reason: str) -> UserError:
    return UserError(
        f"No MLflow answers at {uri} ({reason}); correct MLFLOW_TRACKING_URI or start the server, "
        "and give the same command again."
    )


def unusable_store(error: BaseException, uri: str) -> UserError | None:
    """Make the error for a store that no other address or server would mend, else none.

    Args:
        error: what MLflow said.
        uri: of the store.
    """
    text = str(error)
    schema = re.search(r"database schema \(found version (\w+), but expected (\w+)\)", text)
    if schema:
        return UserError(
            f"The MLflow database at {uri} was made by another version of MLflow (its schema is "
            f"{schema[1]}, that of this one {schema[2]}); back it up and give: "
            f"mlflow db upgrade {shlex.quote(uri)}"
        )
    if "filesystem tracking backend" in text or "filesystem model registry backend" in text:
        return UserError(
            f"The MLflow store {uri} is a folder of files, which MLflow does not take any more; "
            "bring it into a database with mlflow migrate-filestore, and set MLFLOW_TRACKING_URI "
            "to sqlite:///FILE or a server."
        )
    code = re.search(r"error code '?(401|403)\b|(Unauthorized|Permission denied)", text)
    if code:
        return UserError(
            f"MLflow at {uri} does not let this user in ({code[1] or code[2]}); set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    if "readonly database" in text:
        return UserError(
            f"The MLflow database at {uri} may not be written by this user; let its owner allow "
            "it, or set MLFLOW_TRACKING_URI to another."
        )
    return None


def _check_database(file: Path) -> None:
    """Open a database first: MLflow tries what it cannot open for two minutes.

    Raises:
        OSError: if it may not be read or is something else.
    """
    with open(file, "rb") as stream:
        begin = stream.read(len(_SQLITE))
    if begin not in (_SQLITE, b""):
        raise OSError(errno.EINVAL, "is no SQLite database", str(file))


def _make_database(path: Path) -> None:
    """Make MLflow's tables in one step; several processes at once, or a kill, would spoil them."""
    from mlflow import MlflowClient

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        scratch = path.with_name(f"{path.name}.making")
        scratch.unlink(missing_ok=True)
        client = MlflowClient(sqlite_uri(scratch), registry_uri=sqlite_uri(scratch))
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
        os.replace(scratch, path)


def ensure_experiment(client: MlflowClient, name: str, uri: str) -> str:
    """Return the id of the experiment, making or restoring it; safe for many processes at once."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location(uri, name), EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    for key in EXPERIMENT_TAGS.keys() - experiment.tags.keys():  # it was made by somebody else
        client.set_experiment_tag(experiment.experiment_id, key, EXPERIMENT_TAGS[key])
    return experiment.experiment_id
