"""Addresses of MLflow's pages: of a run, or of a version of a model, itself."""

from __future__ import annotations

import shlex
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

from lorat_platform.recording.store import tracking_uri

PORT = 5000
"""Where a server on this machine listens that a person is told to start."""
VIEW_TAG = "mlflow.sharedViewState."
"""Begin of the tags of an experiment that hold its shared views."""
VIEW = "?workflowType=machine_learning"
"""What makes a page show trained models: without it, MLflow shows language-model traces to whoever
has not chosen otherwise in this browser, whatever the experiment's kind is."""


def run_page(experiment_id: str, run_id: str) -> str:
    """Return the page of a run, as it is called within the server."""
    return f"#/experiments/{experiment_id}/runs/{run_id}{VIEW}"


def table_page(experiment_id: str, key: str) -> str:
    """Return the page of an experiment's runs as a shared view shows them.

    Args:
        experiment_id: of the experiment.
        key: of the view, which :func:`table_view` describes.
    """
    return f"#/experiments/{experiment_id}/runs{VIEW}&viewStateShareKey={key}"


def table_view(
    params: Iterable[str], metrics: Sequence[str], query: str, *, descending: bool
) -> dict[str, Any]:
    """Return what MLflow's pages store of a view of runs that somebody shares.

    Args:
        params: parameters that are columns.
        metrics: metrics that are columns; the first orders the rows.
        query: which runs are shown.
        descending: whether large values come first.
    """
    columns = [f"params.`{name}`" for name in params] + [f"metrics.`{name}`" for name in metrics]
    return {
        "selectedColumns": columns,
        "searchFilter": query,
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": not descending,
    }


def version_page(name: str, version: str) -> str:
    """Return the page of a model's version, as it is called within the server."""
    return f"#/models/{urllib.parse.quote(name, safe='')}/versions/{version}{VIEW}"


def address(page: str) -> str:
    """Return the whole address of a page: on the server in use, else on one of this machine."""
    uri = tracking_uri()
    return f"{uri.rstrip('/') if _is_server(uri) else f'http://127.0.0.1:{PORT}'}/{page}"


def server_command() -> str | None:
    """Return what starts a server on the store in use; none where a server is in use."""
    uri = tracking_uri()
    if _is_server(uri):
        return None
    return f"mlflow server --backend-store-uri {shlex.quote(uri)} --port {PORT}"


def how_to_open(page: str) -> str:
    """Return what shows a page: its address, after the command for a server if none is in use."""
    command = server_command()
    return address(page) if command is None else f"{command}   then {address(page)}"


def _is_server(uri: str) -> bool:
    return urllib.parse.urlsplit(uri).scheme in ("http", "https")
