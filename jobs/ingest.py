"""Turn published datasets into shards, and check, repair and show shards.

python jobs/ingest.py got10k --source DIR --output URI
python jobs/ingest.py verify URI
python jobs/ingest.py reindex URI
python jobs/ingest.py preview URI --output grid.png
"""

from __future__ import annotations

import bootstrap  # noqa: F401

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import command
import tyro

from lorat.config import fields
from lorat.config.bounds import Bounds, Seed, check_bounds
from lorat.config.variants import get_variant
from lorat.data.datasets import DATASETS, RawDataset
from lorat.data.shards.frame_index import FrameIndex, summary
from lorat.errors import UserError
from lorat_platform import cluster
from lorat_platform.data.ingestion import IngestConfig, format_report, ingest, map_tasks

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every byte range, image and box of a dataset."""

    uri: tyro.conf.Positional[str]
    """Dataset: a local folder, s3://BUCKET/PATH or gs://BUCKET/PATH."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""


@dataclass(frozen=True, kw_only=True)
class Reindex:
    """Rebuild the frame index of a dataset from its shards."""

    uri: tyro.conf.Positional[str]
    """Dataset: a local folder, s3://BUCKET/PATH or gs://BUCKET/PATH."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Draw sampled pairs as the network gets them: crops, boxes, mask, augmentation."""

    uri: tyro.conf.Positional[str]
    """Dataset: a local folder, s3://BUCKET/PATH or gs://BUCKET/PATH."""
    output: Path = Path("grid.png")
    """Picture to write."""
    variant: str = "B-224"
    """Variant whose crops are drawn."""
    num_pairs: Annotated[int, Bounds(1, 1000)] = 8
    """Pairs to draw, 1 to 1000."""
    seed: Seed = 42
    """Seed of the pairs, 0 to 4,294,967,295."""

    def __post_init__(self) -> None:
        get_variant(self.variant)
        check_bounds(self, fields.flag)


def _ingest_command(name: str, source: type[RawDataset]) -> Any:
    """Join the options of a dataset and those of every ingest into one command."""
    kind = dataclasses.make_dataclass(
        f"Ingest{source.__name__}",
        [
            ("dataset", tyro.conf.OmitArgPrefixes[source]),  # type: ignore[valid-type]
            ("config", tyro.conf.OmitArgPrefixes[IngestConfig]),
        ],
        frozen=True,
        kw_only=True,
    )
    kind.__doc__ = source.__doc__
    return Annotated[kind, tyro.conf.subcommand(name=name)]


COMMANDS = Union[  # noqa: UP007
    tuple(
        [_ingest_command(name, source) for name, source in DATASETS.items()]
        + [
            Annotated[kind, tyro.conf.subcommand(name=name)]
            for name, kind in (("verify", Verify), ("reindex", Reindex), ("preview", Preview))
        ]
    )
]


def run_ingest(source: RawDataset, config: IngestConfig) -> int:
    """Ingest one dataset and print what was odd in it."""
    with cluster.connected(config.address) as ray_cluster:
        log.info("Ingesting with %s.", ray_cluster)
        result = ingest(source, config)
    log.info("\n%s\n", format_report(result.findings))
    log.info("%s", summary(result.index))
    return 0


def run_verify(uri: str, address: str | None) -> int:
    """Verify a dataset and print what is wrong with it; 1 if anything is."""
    from lorat.data.shards.verification import verify

    index = FrameIndex.open(uri)
    with cluster.connected(address):
        problems = verify(uri, functools.partial(map_tasks, what="verify"))
    for problem in problems:
        log.info("%s: %s", problem.where, problem.what)
    if problems:
        log.info("%d problems in %s.", len(problems), uri)
        return command.EXIT_FAILURE
    log.info("All %d images, ranges and boxes are right.\n%s", index.num_frames, summary(index))
    say_what_is_unchecked(index)
    return 0


def run_reindex(uri: str, address: str | None) -> int:
    """Rebuild an index."""
    from lorat.data.shards.verification import rebuild_index

    with cluster.connected(address):
        index = rebuild_index(uri, functools.partial(map_tasks, what="reindex"))
    log.info("%s", summary(index))
    say_what_is_unchecked(index)
    return 0


def say_what_is_unchecked(index: FrameIndex) -> None:
    """Say how many shards an earlier version wrote, of which only the images can be checked."""
    if index.unchecked_shards:
        log.info(
            "%d of %d shards carry no checksums (%s, ...): damage of their boxes cannot be told; "
            "ingest the dataset again for shards that carry them.",
            len(index.unchecked_shards), len(index.shard_files), index.unchecked_shards[0],
        )  # fmt: skip


def run_preview(options: Preview) -> int:
    """Write the picture of some pairs."""
    import cv2

    from lorat.learning.preview import draw_pairs

    index = FrameIndex.open(options.uri)
    picture = draw_pairs(
        index, get_variant(options.variant), num_pairs=options.num_pairs, seed=options.seed
    )
    if not cv2.haveImageWriter(str(options.output)):
        raise UserError(f"Cannot write {options.output}: give a name that ends in .png or .jpg.")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        written = cv2.imwrite(str(options.output), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    except OSError:
        written = False
    if not written:
        raise UserError(f"Cannot write {options.output}; give a file in a folder with room.")
    log.info("%d pairs of %s: %s", options.num_pairs, options.uri, options.output)
    return 0


def main() -> int:
    """Run the chosen command."""
    chosen = command.parse(COMMANDS, description=__doc__)
    if isinstance(chosen, Verify):
        return run_verify(chosen.uri, chosen.address)
    if isinstance(chosen, Reindex):
        return run_reindex(chosen.uri, chosen.address)
    if isinstance(chosen, Preview):
        return run_preview(chosen)
    return run_ingest(chosen.dataset, chosen.config)


if __name__ == "__main__":
    command.run(main)
