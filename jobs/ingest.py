"""Turn published datasets into shards, and check, repair and show shards.

python jobs/ingest.py got10k --source DIR --output URI
python jobs/ingest.py verify URI
python jobs/ingest.py reindex URI
python jobs/ingest.py preview URI --output grid.png
"""

from __future__ import annotations

import bootstrap  # noqa: F401

import functools
import logging
import sys

import command
import flags
from ingest_commands import Preview, Reindex, Verify, commands

from lorat.config.variants import get_variant
from lorat.data.datasets import RawDataset
from lorat.data.shards.frame_index import FrameIndex, summary
from lorat.errors import named
from lorat_platform import cluster
from lorat_platform.data.ingestion import IngestConfig, format_report, ingest, map_tasks

log = logging.getLogger(__name__)


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
    return 0


def run_reindex(uri: str, address: str | None) -> int:
    """Rebuild an index."""
    from lorat.data.shards.verification import rebuild_index

    with cluster.connected(address):
        index = rebuild_index(uri, functools.partial(map_tasks, what="reindex"))
    log.info("%s", summary(index))
    return 0


def run_preview(options: Preview) -> int:
    """Write the picture of some pairs."""
    from lorat.learning.preview import check_picture, draw_pairs, write_picture

    check_picture(options.output)
    index = FrameIndex.open(options.uri)
    variant = get_variant(options.variant)
    picture = draw_pairs(index, variant, num_pairs=options.num_pairs, seed=options.seed)
    write_picture(picture, options.output)
    log.info("%d pairs of %s: %s", options.num_pairs, options.uri, named(options.output))
    return 0


def main() -> int:
    """Run the chosen command."""
    chosen = flags.parse(commands(), description=__doc__)
    if isinstance(chosen, Verify):
        return run_verify(chosen.uri, chosen.address)
    if isinstance(chosen, Reindex):
        return run_reindex(chosen.uri, chosen.address)
    if isinstance(chosen, Preview):
        return run_preview(chosen)
    return run_ingest(chosen.dataset, chosen.config)


if __name__ == "__main__":
    # What looks at shards begins anew.
    command.run(main, goes_on=not {"verify", "reindex", "preview"} & set(sys.argv[1:2]))
