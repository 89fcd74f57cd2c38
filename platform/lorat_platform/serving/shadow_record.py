"""What a shadow found, in MLflow: a run for each model that served beside it."""

from __future__ import annotations

import csv
import io
import time

import numpy as np

from lorat.metrics.confidence import BINS
from lorat_platform.promotion.shadows import BESIDE, EXPERIMENT, SHADOW
from lorat_platform.recording.run import Run, open_run
from lorat_platform.serving.shadow import LATENCIES_MS, Agreement, Shadow


class ShadowRecord:
    """Writes agreements into MLflow; never waits for it.

    Args:
        shadow: whose.
        replica: name of the replica, each of which has its own runs.
    """

    def __init__(self, shadow: Shadow, replica: str) -> None:
        self._shadow, self._replica = shadow, replica
        self._began = time.monotonic()
        self._runs: dict[str, Run] = {}

    def write(self) -> None:
        """Write the figures as they are now."""
        for beside, agreement in list(self._shadow.agreements.items()):
            if not agreement.frames:
                continue
            run = self._runs.get(beside)
            if run is None:
                name = self._shadow.model.name
                run = self._runs[beside] = open_run(
                    EXPERIMENT,
                    f"shadow {name} beside {beside}",
                    tags={
                        "job": "serve", "replica": self._replica, SHADOW: name, BESIDE: beside,
                    },
                )  # fmt: skip
            run.log_metrics(agreement.metrics(), step=int(time.monotonic() - self._began))

    def close(self) -> None:
        """Write for the last time, with the distributions, and end the runs."""
        self.write()
        for beside, run in self._runs.items():
            run.log_bytes(_table(self._shadow.agreements[beside]).encode(), "distributions.csv")
            run.close()


def _table(agreement: Agreement) -> str:
    """Return the histograms as CSV: what, upper end of the bin, frames."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["what", "up_to", "frames"])
    ends = (np.arange(BINS) + 1) / BINS
    for what, counts in (
        ("overlap", agreement.overlaps),
        ("score of the shadow", agreement.scores),
        ("score of what served", agreement.served_scores),
    ):
        rows.writerows([what, f"{end:g}", n] for end, n in zip(ends, counts, strict=True))
    rows.writerows(
        ["ms of the shadow", end, n]
        for end, n in zip((*LATENCIES_MS, "inf"), agreement.latencies, strict=True)
    )
    return text.getvalue()
