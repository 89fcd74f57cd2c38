"""What killed jobs left on this machine, removed by the start of every job.

Who made a file is in its name (:mod:`lorat.files.scratch`), who drives a run or a search in its
folder (:mod:`lorat_platform.runs.claim`) and beside its crops; what has a living owner stays.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from pathlib import Path

from lorat.files import scratch, storage
from lorat.files.home import home
from lorat_platform.runs import checkpoints
from lorat_platform.runs.claim import Driven, Lease
from lorat_platform.search.trial.crop_cache import remove_stale_caches

RAY_AGENTS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")
"""Processes that outlive a killed Ray by a minute, in which they try to tell it so."""


def sweep() -> None:
    """Remove temporary files, decoded crops, and halves of checkpoints in the home folder's runs.

    Runs in other storages are swept when they are gone on with.  Agents of a Ray that was killed
    with its driver are ended.

    Raises:
        OSError: if a folder cannot be read.
        UserError: if a run's folder cannot be written.
    """
    cache = storage.cache_folder()
    for folder in (
        Path(tempfile.gettempdir()), home() / "models", cache, cache / "index",
        storage.upload_folder(),
    ):  # fmt: skip
        scratch.sweep(folder)
    remove_stale_caches()
    end_orphaned_agents()
    for run in (home() / "runs").glob("*/"):
        _sweep_run(run)


def end_orphaned_agents() -> None:
    """End this user's agents whose raylet, always their parent, is gone."""
    for process in Path("/proc").glob("[0-9]*"):
        # It ended since, or is another user's.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            title = (process / "cmdline").read_bytes().rstrip(b"\0 ")
            if title not in RAY_AGENTS or process.stat().st_uid != os.getuid():
                continue
            # Parents of those in containers are seen under other numbers there.
            near = os.readlink(process / "ns" / "pid") == os.readlink("/proc/self/ns/pid")
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if near and Path(f"/proc/{parent}/comm").read_text() != "raylet\n":
                os.kill(int(process.name), signal.SIGKILL)


def _sweep_run(run: Path) -> None:
    """Remove what is left of checkpoints in a run's or a search's folder, if nobody drives it."""
    folders = [run, *(run / checkpoints.BETWEEN_RUNGS).glob("*/")]
    for folder in folders:
        scratch.sweep(folder)
    places = [storage.locate(folder) for folder in folders]
    left = [place for place in places if checkpoints.parts(place)]
    if not left:
        return
    lease = Lease(storage.locate(run), f"The run {run.name}", "let it be")
    try:
        lease.claim()
    except Driven:
        return
    with lease:
        for place in left:
            checkpoints.sweep_parts(place)
