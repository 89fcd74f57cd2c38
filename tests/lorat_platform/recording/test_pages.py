"""Addresses lead to the page of a run or version itself, and to the view of trained models."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorat_platform.recording import pages


def test_a_page_on_a_server_is_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example/team/")
    assert pages.how_to_open(pages.run_page("3", "abc")) == (
        "https://mlflow.example/team/#/experiments/3/runs/abc?workflowType=machine_learning"
    )
    assert pages.address(pages.version_page("a b", "2")) == (
        "https://mlflow.example/team/#/models/a%20b/versions/2?workflowType=machine_learning"
    )


def test_a_page_of_a_local_store_comes_with_the_command_for_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path))
    assert pages.how_to_open(pages.run_page("1", "abc")) == (
        f"mlflow server --backend-store-uri sqlite:///{tmp_path}/mlflow.db --port 5000   then "
        "http://127.0.0.1:5000/#/experiments/1/runs/abc?workflowType=machine_learning"
    )
