"""Trials and steps per second through the journals and into MLflow."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from lorat.files.scratch import temporary_folder
from lorat_platform.recording.run import Run, open_run

VALUES = 8
"""Metrics in a record."""
PARAMS = 8
RECORDS = 20
"""Records of each trial."""
FLUSH_S = 300.0
"""Longest wait for MLflow."""


@dataclass(frozen=True, kw_only=True)
class RecordRate:
    """What one process that drives some trials reaches."""

    trials: int
    journal_per_s: float
    """Records of all trials written into their journals."""
    delivered_per_s: float
    """Records of all trials that MLflow has taken."""
    trials_per_s: float
    """Trials begun and ended in MLflow, without their records."""


def measure_records(sizes: list[int], uri: str | None) -> list[RecordRate]:
    """Let a process drive each number of trials at once.

    Args:
        sizes: numbers of trials.
        uri: of the MLflow server; none means a SQLite store made for this.

    Raises:
        RuntimeError: if MLflow does not take everything in time.
    """
    context = multiprocessing.get_context("spawn")
    with temporary_folder() as home, ProcessPoolExecutor(1, context) as pool:
        store = uri or f"sqlite:///{home}/mlflow.db"
        environment = {"LORAT_HOME": str(home), "MLFLOW_TRACKING_URI": store}
        pool.submit(_drive, environment, 1, 1).result()  # imports MLflow, makes the store
        return [pool.submit(_drive, environment, size, RECORDS).result() for size in sizes]


def _drive(environment: dict[str, str], trials: int, records: int) -> RecordRate:
    os.environ.update(environment)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    began = time.perf_counter()
    runs = [open_run("scale", f"trial-{trial:03d}") for trial in range(trials)]
    for run in runs:
        run.log_params({f"param-{number}": number for number in range(PARAMS)})
    _deliver(runs)
    opened = time.perf_counter()
    for step in range(records):
        for run in runs:
            run.log_metrics({f"metric-{number}": step for number in range(VALUES)}, step)
    written = time.perf_counter()
    _deliver(runs)
    delivered = time.perf_counter()
    for run in runs:
        run.write({"op": "status", "time_ms": time.time_ns() // 1_000_000, "status": "FINISHED"})
    _deliver(runs)
    ended = time.perf_counter()
    for run in runs:
        run.close()
    return RecordRate(
        trials=trials,
        journal_per_s=trials * records / (written - opened),
        delivered_per_s=trials * records / (delivered - opened),
        trials_per_s=trials / (opened - began + ended - delivered),
    )


def _deliver(runs: Sequence[Run]) -> None:
    for run in runs:
        if not run.flush(FLUSH_S):
            raise RuntimeError(f"MLflow at {run.uri} has not taken all records in {FLUSH_S:.0f} s.")
