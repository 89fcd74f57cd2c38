"""MLflow stores and servers of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mlflow_home import make_home
from tests.mlflow_server import Proxy, Server, running_server


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a home folder with an empty local store; return the folder."""
    monkeypatch.setenv("LORAT_HOME", str(make_home(tmp_path / "home")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run an MLflow server."""
    with running_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Put a proxy in front of the server; MLFLOW_TRACKING_URI names it."""
    proxy = Proxy(server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    yield proxy
    proxy.close()
