"""Where the trials of a search fit, and whether they all see its storage."""

from __future__ import annotations

import os
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lorat.errors import UserError
from lorat.files import storage
from lorat_platform.cluster.places import num_places, what_is_there
from lorat_platform.search.plan import SearchOptions


def count_slots(options: SearchOptions) -> int:
    """Return how many trials fit into the cluster at once, at most ``--concurrent``.

    Raises:
        UserError: if not even one fits.
    """
    need = worker_resources(options)
    places = num_places(need)
    if places is None:
        raise UserError(
            "A trial asks for neither CPUs nor GPUs, so any number would run at once; give "
            "--cpus-per-trial or --gpus-per-trial above 0."
        )
    slots = places // options.workers_per_trial
    if slots < 1:
        wanted = " and ".join(f"{v:g} {k}" for k, v in need.items() if v > 0)
        raise UserError(
            f"A trial needs {options.workers_per_trial} × {wanted} but the nodes have "
            f"{what_is_there(need)}; "
            "lower --workers-per-trial, --cpus-per-trial or --gpus-per-trial, or add nodes."
        )
    return min(slots, options.trials, options.concurrent or slots)


def check_reach(location: storage.Location, options: SearchOptions) -> None:
    """Check that every node which can run trials sees a local storage folder.

    Raises:
        UserError: if one does not.
    """
    if not location.is_local:
        return
    need = worker_resources(options)
    unseen = [
        node["NodeManagerHostname"]
        for node in ray.nodes()
        if node["Alive"]
        and all(node["Resources"].get(k, 0.0) >= v for k, v in need.items())
        and not _sees(node["NodeID"], location.path)
    ]
    if unseen:
        raise UserError(
            f"The storage {location.path} is a folder that {', '.join(unseen)} cannot see; give "
            "--storage with an s3:// or gs:// address, or a folder that all nodes share."
        )


def _sees(node_id: str, folder: str) -> bool:
    """Tell whether a file that is written here can be read on a node."""
    mark = Path(folder) / f".seen-from-{node_id}"
    mark.touch()
    try:
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = ray.remote(num_cpus=0)(os.path.exists)
        return ray.get(task.options(scheduling_strategy=there).remote(str(mark)))
    finally:
        mark.unlink(missing_ok=True)


def worker_resources(options: SearchOptions) -> dict[str, float]:
    gpus = options.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    return {"CPU": options.cpus_per_trial, "GPU": gpus}
