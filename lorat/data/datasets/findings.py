"""Findings: what was odd in a dataset, where, and what was done about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Action = Literal["kept", "repaired", "dropped"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One anomaly: where, what was done, and why."""

    sequence: str
    """Name of the sequence; empty if it concerns the whole dataset."""
    action: Action
    why: str
    frames: tuple[int, ...] = ()
    """Numbers of the frames concerned; empty means the sequence as a whole."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"frames": list(self.frames)}


class Findings:
    """Anomalies in the order they were met; frames of one kind are gathered in one finding."""

    def __init__(self) -> None:
        self._frames: dict[tuple[str, Action, str], list[int]] = {}

    def add(self, sequence: str, action: Action, why: str, frames: Iterable[int] = ()) -> None:
        """Note an anomaly."""
        self._frames.setdefault((sequence, action, why), []).extend(int(f) for f in frames)

    def __iter__(self) -> Iterator[Finding]:
        for (sequence, action, why), frames in self._frames.items():
            yield Finding(sequence=sequence, action=action, why=why, frames=tuple(frames))

    def __len__(self) -> int:
        return len(self._frames)
