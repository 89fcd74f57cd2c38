"""What breaks first when it grows: rates that no pixel decides, their laws, and the limits."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lorat.config.bounds import Bounds, check_bounds
from lorat.config.fields import flag
from lorat_platform.cluster.machine import processor_name
from lorat_platform.recording.store import check_answers
from lorat_platform.scale.blocks import measure_blocks
from lorat_platform.scale.claims import measure_claims
from lorat_platform.scale.fits import fit
from lorat_platform.scale.frames import check_room, measure_index
from lorat_platform.scale.limits import Capacity, note, table
from lorat_platform.scale.records import measure_records

log = logging.getLogger(__name__)

TITLES = {
    "blocks": "blocks of the stream, one control loop",
    "training_blocks": "blocks of the stream, as many control loops as a training has",
    "index": "index of frames",
    "records": "records in journals and MLflow",
    "claims": "claims of run folders",
}
"""What is measured, and how it is called in the figures."""


@dataclass(frozen=True, kw_only=True)
class ScaleBenchmark:
    """Measure what does not depend on pixels, and compute what limits 8, 64 and 256 GPUs."""

    consumers: Annotated[int, Bounds(2, 256)] = 32
    """Most consumers of the stream, 2 to 256; powers of two below it are measured, too."""
    seconds: Annotated[float, Bounds(0, 3600, above=True)] = 4.0
    """Duration of each measurement of the stream, more than 0, at most 3600."""
    frames: Annotated[int, Bounds(10_000, 1_000_000_000)] = 100_000_000
    """Frames of the largest index, 10,000 to 1,000,000,000; a tenth and a hundredth of it are
    measured, too.  While it is made each takes 130 bytes of disk."""
    index_folder: Path | None = None
    """Where the index is made; none means where temporary files are."""
    trials: Annotated[int, Bounds(2, 256)] = 64
    """Most trials at once, 2 to 256; powers of four below it are measured, too."""
    mlflow: str | None = None
    """MLflow server that gets the records of an experiment ``scale``; none means a new SQLite
    store."""
    drivers: Annotated[int, Bounds(2, 256)] = 16
    """Most drivers that claim folders at once, 2 to 256; powers of four below it, too."""
    storage: str | None = None
    """Folder or bucket for the claims; none means an S3 server on this machine."""

    def __post_init__(self) -> None:
        check_bounds(self, flag)


def benchmark_scale(options: ScaleBenchmark) -> dict[str, float]:
    """Run the benchmark, print its tables and return its figures, ``PART.SIZE.FIGURE``.

    Raises:
        UserError: if a place that is asked for cannot be used.
    """
    check_room(options.frames, options.index_folder)
    if options.mlflow is not None:
        check_answers(options.mlflow)
    load = os.getloadavg()[0]
    log.info("%s, load %.1f", processor_name(), load)
    figures: dict[str, float] = {"load": load}
    blocks = measure_blocks(powers(2, options.consumers), options.seconds)
    _show(figures, "blocks", "consumers", blocks)
    shared = measure_blocks([options.consumers], options.seconds, one_loop=False)
    _show(figures, "training_blocks", "consumers", shared)
    index = measure_index([options.frames // part for part in (100, 10, 1)], options.index_folder)
    _show(figures, "index", "frames", index)
    records = measure_records(powers(4, options.trials), options.mlflow)
    _show(figures, "records", "trials", records)
    claims = measure_claims(powers(4, options.drivers), options.storage)
    _show(figures, "claims", "drivers", claims)
    num = sum(row.blocks_per_s for row in blocks)  # each was measured for as long
    capacity = Capacity(
        loop_ms=sum(row.loop_ms * row.blocks_per_s for row in blocks) / num,
        gcs_ms=sum(row.gcs_ms * row.blocks_per_s for row in blocks) / num,
        records_per_s=records[-1].delivered_per_s,
    )
    log.info("\n%s; the rest is computed (c)\n\n%s", note(), table(capacity))
    return figures


def powers(base: int, most: int) -> list[int]:
    """Return 1, the powers of a base below ``most``, and that."""
    sizes = [1]
    while sizes[-1] * base < most:
        sizes.append(sizes[-1] * base)
    return [*sizes, most]


def _show(figures: dict[str, float], part: str, by: str, rows: Sequence[Any]) -> None:
    """Print the figures of a part at each size, with their laws, and keep them."""
    log.info("%s", TITLES[part])
    names = [name for name in vars(rows[0]) if name not in (by, "loops")]
    sizes = [float(getattr(row, by)) for row in rows]
    log.info("  %-16s %s", by, "".join(f"{size:>14,.0f}" for size in sizes))
    for name in names:
        values = [float(getattr(row, name)) for row in rows]
        law = fit(sizes, values).text if len(rows) > 2 and min(values) > 0 else ""
        log.info("  %-16s %s  %s", name, "".join(f"{value:>14,.4g}" for value in values), law)
        for size, value in zip(sizes, values, strict=True):
            figures[f"{part}.{size:.0f}.{name}"] = value
