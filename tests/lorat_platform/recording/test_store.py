"""The store is the file or server that is meant, and one that cannot be used is called that."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import sqlite3
import threading
from pathlib import Path

import pytest

from lorat.errors import UserError
from lorat_platform.recording import store
from lorat_platform.registry import versions


@pytest.mark.parametrize("name", ["home%20x", "ho?me", "h#x y&a=b", "ü:%C3@x", "%25%3F"])
def test_any_home_folder_holds_its_store(
    name: str, own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(own_store, tmp_path / "other" / name)
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "other" / name))
    uri = store.tracking_uri()
    assert store.is_sqlite(uri)
    assert store.sqlite_file(uri) == tmp_path / "other" / name / "mlflow.db"
    client = store.connect()
    run = client.create_run(store.ensure_experiment(client, "some", uri))
    client.log_text(run.info.run_id, "hello", "a:b%20.txt")
    (found,) = (tmp_path / "other").rglob("a:b%20.txt")
    assert found.is_relative_to(tmp_path / "other" / name / "mlartifacts")
    assert os.listdir(tmp_path / "other") == [name], "and nothing is made beside it"


def test_plain_paths_and_given_addresses_stay_as_they_are(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.tracking_uri() == f"sqlite:///{own_store}/mlflow.db"
    assert store.sqlite_file("sqlite:////a%20b/c.db?mode=ro") == Path("/a b/c.db")
    assert store.is_sqlite("sqlite+pysqlite:////a.db")
    monkeypatch.setenv("LORAT_HOME", "")
    assert store.tracking_uri() == f"sqlite:///{Path.home()}/.lorat/mlflow.db"
    monkeypatch.setenv("LORAT_HOME", os.fsdecode(b"/M\xfc"))
    with pytest.raises(UserError, match=r"/M\\xfc/mlflow.db has bytes in its name"):
        store.tracking_uri()


def ask() -> None:
    with store.needing_mlflow():
        store.connect().search_registered_models()


@pytest.mark.parametrize(
    "question", [ask, lambda: versions.resolve("models:/lorat/1")], ids=["all", "one model"]
)
def test_a_store_that_cannot_be_used_is_called_that(
    question: object, own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(question)
    database = tmp_path / "old.db"
    shutil.copyfile(own_store / "mlflow.db", database)
    connection = sqlite3.connect(database)
    connection.execute("update alembic_version set version_num = 'bf29a5ff90ea'")
    connection.commit()
    connection.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    with pytest.raises(UserError, match=f"mlflow db upgrade sqlite:///{database}$"):
        question()
    (tmp_path / "mlruns").mkdir()
    for uri in (f"{tmp_path}/mlruns", f"file://{tmp_path}/mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UserError, match="is a folder of files, which MLflow does not take"):
            question()
    database = tmp_path / "junk.db"
    database.write_text("junk" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    with pytest.raises(OSError, match="is no SQLite database"):
        question()


class _Answer(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_POST(self) -> None:
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(b"no")

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (401, r"does not let this user in \(401\); set MLFLOW_TRACKING_USERNAME"),
        (403, r"does not let this user in \(403\); set"),
        (404, r"No MLflow answers at .* \(.*404"),
        (200, r"No MLflow answers at .* \(.*JSON"),
    ],
)
def test_what_is_wrong_with_a_server_is_said(code: int, message: str) -> None:
    handler = type("Answer", (_Answer,), {"code": code})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=message):
            store.check_answers(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_a_server_that_is_silent_or_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as door:
        uri = f"http://127.0.0.1:{door.getsockname()[1]}"
        with pytest.raises(UserError, match="takes the connection and says nothing for 1 s"):
            store.check_answers(uri)
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] != "1"
    for nobody, why in ((uri, "refused"), ("http://no.such.host.invalid:5000", "not known")):
        with pytest.raises(UserError, match=why):
            store.check_answers(nobody)
