"""Commands of ``jobs/ingest.py`` with their flags: one for each dataset, and those for shards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from lorat.config import fields
from lorat.config.bounds import Bounds, Seed, check_bounds
from lorat.config.variants import get_variant
from lorat.data.datasets import DATASETS, RawDataset
from lorat_platform.data.ingestion import IngestConfig


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


def commands() -> Any:
    """Return the union of all commands, one for each dataset that there is now."""
    checks = (("verify", Verify), ("reindex", Reindex), ("preview", Preview))
    kinds = [_ingest_command(name, source) for name, source in DATASETS.items()]
    kinds += [Annotated[kind, tyro.conf.subcommand(name=name)] for name, kind in checks]
    return Union[tuple(kinds)]  # noqa: UP007
