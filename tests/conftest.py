"""What all tests share: their order, a home folder of their own, and no cluster but their own."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_head import ray_head

pytest_plugins = ["tests.time_limit", "tests.open_doors"]

# The workers of pytest-xdist share the cores: threads of torch in each of them would only wait for
# one another.  Jobs choose their threads by themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put types first, files with tests that start processes last, of these the longest first.

    A worker of pytest-xdist takes whole files, so that what the tests of a file share is made once;
    a long one at the end would leave the other workers without work.
    """
    minutes: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("processes")
        takes = mark.kwargs["minutes"] if mark else 0.0
        minutes[item.path] = max(minutes.get(item.path, 0.0), takes)
    items.sort(key=lambda item: minutes[item.path], reverse=True)
    items.sort(key=lambda item: minutes[item.path] > 0)
    items.sort(key=lambda item: item.path.name != "test_types.py")


class FirstErrors:
    """Shows what failed when it fails, and not only after the last test."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Print why a file cannot be read."""
        self._show(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print a failure's end; the whole of it stands in the summary."""
        self._show(report)

    def _show(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write("\n")
            terminal.write_line(f"{report.outcome.upper()} {report.nodeid}")
            terminal.write_line(report.longreprtext[-2000:])


def pytest_configure(config: pytest.Config) -> None:
    """Show failures early, where the results of all test processes arrive."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FirstErrors(config))


@pytest.fixture(scope="session", autouse=True)
def own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep runs, journals and the MLflow store of the tests out of the user's home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAT_HOME", str(tmp_path_factory.mktemp("home")))
        # One token for what the tests start and for the jobs that use it, and none of the user's.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let Ctrl-C reach what the tests start, also where a shell started the tests behind ``&``."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a Ray of two CPUs, for jobs that need not start one of their own."""
    with ray_head(tmp_path_factory.mktemp("ray")) as address:
        yield address


@pytest.fixture
def shared_ray(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs find that Ray, as RAY_ADDRESS names it."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
