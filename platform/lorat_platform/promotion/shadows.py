"""What models found as shadows beside those that served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXPERIMENT = "serving"
"""Of the runs with what a shadow found."""
SHADOW, BESIDE = "shadow", "shadow.beside"
"""Tags of such a run: both models, as ``lorat/4``."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a model found beside another, in all runs."""

    beside: str
    frames: int
    overlap: float
    """Mean over frames of the overlap of both boxes, 0 to 1."""
    share_apart: float
    """Share of the frames whose overlap is below 0.5."""
    score: float
    served_score: float

    def __str__(self) -> str:
        return (
            f"as a shadow beside {self.beside}: {self.frames:,} frames, mean overlap "
            f"{self.overlap:.3f}, apart in {100 * self.share_apart:.1f} %, mean score "
            f"{self.score:.3f} against {self.served_score:.3f}"
        )


def found_of(client: Any, model: str) -> list[Found]:
    """Return what a model, as ``lorat/4``, found as a shadow, by the model that served."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    runs = client.search_runs(
        [experiment.experiment_id], filter_string=f"tags.{SHADOW} = '{model}'", max_results=1000
    )
    by_other: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if run.data.metrics.get("shadow/frames", 0) > 0:
            by_other.setdefault(run.data.tags.get(BESIDE, "?"), []).append(run.data.metrics)
    return [
        Found(
            beside=other,
            frames=int(sum(m["shadow/frames"] for m in metrics)),
            overlap=_mean(metrics, "shadow/overlap"),
            share_apart=_mean(metrics, "shadow/share_apart"),
            score=_mean(metrics, "shadow/score"),
            served_score=_mean(metrics, "shadow/served_score"),
        )
        for other, metrics in sorted(by_other.items())
    ]


def _mean(runs: list[dict[str, float]], name: str) -> float:
    """Return the mean over the frames of all runs."""
    frames = sum(run["shadow/frames"] for run in runs)
    return sum(run["shadow/frames"] * run[name] for run in runs) / frames
