"""Look runs up in MLflow, and log to one as a training does."""

from __future__ import annotations

import time

from lorat_platform.recording import run as recording
from lorat_platform.recording.store import connect


def history(run_id: str, name: str) -> dict[int, float]:
    """Return a metric's values by step, each of which MLflow has once."""
    points = connect().get_metric_history(run_id, name)
    steps = [point.step for point in points]
    assert len(steps) == len(set(steps)), "a metric arrived twice"
    return {point.step: point.value for point in points}


def find_runs(experiment: str) -> list:
    """Return the runs of an experiment."""
    client = connect()
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def log_fast(run: recording.Run, steps: range) -> None:
    """Log a metric per step, and show that no call waits for MLflow."""
    slowest = 0.0
    for step in steps:
        start = time.perf_counter()
        run.log_metrics({"loss": float(step)}, step)
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.5
