from __future__ import annotations

from typing import Any

import pytest

from lorat_platform.cluster import places
from lorat_platform.cluster.phases import Phases
from lorat_platform.cluster.places import Reminder, num_places, what_is_there


def _node(*, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


def test_what_single_nodes_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [_node(CPU=15), _node(CPU=7, GPU=1), _node(CPU=99, GPU=8, alive=False)]
    monkeypatch.setattr(places.ray, "nodes", lambda: nodes)
    need = {"CPU": 8.0, "GPU": 1.0}
    assert num_places(need) == 0, "no node has both"
    assert what_is_there(need) == "15 CPU; 7 CPU + 1 GPU"
    nodes += [_node(CPU=15), _node(memory=1.0)]
    assert what_is_there(need) == "2 × 15 CPU; 7 CPU + 1 GPU; nothing of it"


def test_what_is_missing_is_looked_at_again_and_what_follows_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(places.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Phases, "_repeat", lambda self: None)  # its thread would see this clock
    said: list[str] = []
    with Phases(said.append) as phases:
        reminder = Reminder(phases, then="starting")
        for missing in ("4 GPUs", "4 GPUs", "3 GPUs", None, None):
            assert reminder.due()
            reminder.tell(missing)
            assert not reminder.due()
            assert reminder.waits == bool(missing)
            clock[0] += places.REMIND_S
    assert said == ["waiting for nodes: 4 GPUs", "waiting for nodes: 3 GPUs", "starting"]
