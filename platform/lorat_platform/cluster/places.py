"""How many processes of one kind the nodes of the cluster can hold, and waiting for more."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping

import ray

from lorat_platform.cluster.phases import Phases

REMIND_S = 30.0
"""Time between two looks at, and two lines about, what a job waits for."""


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
    """Say what single nodes have of what is needed, such as ``2 × 15 CPU; 7 CPU + 1 GPU``."""
    nodes = Counter(_has(node["Resources"], need) for node in ray.nodes() if node["Alive"])
    return "; ".join(
        f"{count} × {has}" if count > 1 else has
        for has, count in sorted(nodes.items(), key=lambda item: (-item[1], item[0]))
    )


def _has(resources: Mapping[str, float], need: Mapping[str, float]) -> str:
    parts = [f"{resources[name]:g} {name}" for name in need if resources.get(name, 0.0) > 0]
    return " + ".join(parts) or "nothing of it"


class Reminder:
    """Says what a job waits for, at once and then every :data:`REMIND_S` as long as it lasts.

    Args:
        phases: where the wait is one.
        then: the phase that goes on when nothing is missing any more; none for none.
    """

    def __init__(self, phases: Phases, *, then: str = "") -> None:
        self._phases = phases
        self._then = then
        self.waits = False
        """Whether something was missing when it was told last."""
        self._again_at = 0.0

    def due(self) -> bool:
        """Tell whether it is time to look again, which may cost a call of the cluster."""
        return time.monotonic() >= self._again_at

    def tell(self, missing: str | None) -> None:
        """Say what is missing; none means that nothing is."""
        self._again_at = time.monotonic() + REMIND_S
        if missing:
            self._phases.begin(f"waiting for nodes: {missing}", every_s=REMIND_S)
        elif self.waits and self._then:
            self._phases.begin(self._then)
        elif self.waits:
            self._phases.end()
        self.waits = bool(missing)
