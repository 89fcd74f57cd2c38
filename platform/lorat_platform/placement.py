"""How many processes of one kind the nodes of the cluster can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ray


def num_places(need: Mapping[str, float]) -> int | None:
    """Count the processes that fit into the living nodes; none for any number of them.

    Args:
        need: what each asks for, such as ``{"CPU": 2, "GPU": 0.5}``.
    """
    need = {name: amount for name, amount in need.items() if amount > 0}
    if not need:
        return None
    return sum(
        min(math.floor(node["Resources"].get(k, 0.0) / v + 1e-9) for k, v in need.items())
        for node in ray.nodes()
        if node["Alive"]
    )


def what_is_there(need: Mapping[str, float]) -> str:
    """Say how much the largest node has of what is needed."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ", ".join(f"{max((n.get(k, 0.0) for n in nodes), default=0):g} {k}" for k in need)
