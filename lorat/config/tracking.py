"""What makes a tracker of a trained network, and may be changed without training again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lorat.config.bounds import Bounds, Share, check_bounds
from lorat.config.variants import AreaFactor


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """How the network's answers become boxes; a trained model carries it along."""

    window_penalty: Share = 0.45
    """Weight of the Hann window against the score, 0 to 1."""
    min_object_size: Annotated[float, Bounds(1, 1000)] = 10.0
    """Smallest side of the box that the search crop is computed from, 1 to 1000 frame pixels."""
    search_area_factor: AreaFactor | None = None
    """How much context the search crop shows, 1 to 100; none means as much as in training."""

    def __post_init__(self) -> None:
        check_bounds(self, "tracking.{}".format)
