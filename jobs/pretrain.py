"""Pretrain the small variant's backbone on collages of freely licensed pictures.

python jobs/pretrain.py fetch
python jobs/pretrain.py preview --output collages.png
python jobs/pretrain.py train --output backbone.safetensors
"""

from __future__ import annotations

import bootstrap  # noqa: F401

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Union

import command
import flags
import tyro

from lorat.config import fields
from lorat.config.bounds import Bounds, check_bounds
from lorat.config.variants import get_variant
from lorat.data.synthetic import material
from lorat.learning.pretraining import PretrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download the packages, 650 MB, check them and keep their pictures, 350 MB."""

    mirror: str = material.MIRROR
    """Debian mirror, or a date of https://snapshot.debian.org."""
    packages: Path | None = None
    """Folder of the downloaded packages; none means one beside the pictures."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Draw pairs as the network gets them: crops, boxes, mask, augmentation."""

    output: Path = Path("collages.png")
    """Picture to write."""
    variant: str = "T-168"
    """Variant whose crops are drawn."""
    num_pairs: Annotated[int, Bounds(1, 1000)] = 12
    """Pairs to draw, 1 to 1000."""
    first: Annotated[int, Bounds(0, 1_000_000_000)] = 0
    """Number of the first pair, 0 to 1,000,000,000."""

    def __post_init__(self) -> None:
        get_variant(self.variant)
        check_bounds(self, fields.flag)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train all weights, going on from the folder's last checkpoint, and write the backbone."""

    plan: tyro.conf.OmitArgPrefixes[PretrainConfig] = field(default_factory=PretrainConfig)
    folder: Path = Path("pretraining")
    """Folder of the checkpoints."""
    output: Path = Path("backbone.safetensors")
    """File to write: transformer, token types and head, in float16."""


COMMANDS = Union[  # noqa: UP007
    tuple(
        Annotated[k, tyro.conf.subcommand(name=k.__name__.lower())] for k in (Fetch, Preview, Train)
    )
]


def run_fetch(options: Fetch) -> None:
    """Fetch the packages and keep their pictures."""
    piles = material.piles_folder()
    folder = options.packages or piles.with_name("packages")
    kept = material.prepare(material.fetch(folder, options.mirror), piles)
    for pile in material.PILES:
        log.info("%5d %s", len(getattr(kept, pile)), pile)
    log.info("pictures %s\npackages %s (no longer needed)", piles, folder)


def run_preview(options: Preview) -> None:
    """Write the picture of some pairs."""
    import numpy as np

    from lorat.data.synthetic.collage import Collage
    from lorat.learning.preview import draw_batch, write_picture

    variant = get_variant(options.variant)
    numbers = np.arange(options.first, options.first + options.num_pairs)
    pictures = material.Material.open(material.piles_folder())
    batch = Collage(pictures, variant).load(numbers)
    write_picture(draw_batch(batch, variant, [f"pair {n}" for n in numbers]), options.output)
    log.info("%d pairs: %s", options.num_pairs, options.output)


def run_train(options: Train) -> None:
    """Pretrain."""
    import torch

    from lorat.checkpoint.folder import load, save_backbone
    from lorat.learning.pretraining import pretrain

    mean = pretrain(options.plan, material.piles_folder(), options.folder)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    model = load(mean)
    save_backbone(model, options.output, dtype=torch.float16, with_head=True)
    log.info("tracker  %s\nbackbone %s", mean, options.output)


def main() -> None:
    """Run the chosen command."""
    chosen = flags.parse(COMMANDS, description=__doc__)  # type: ignore[arg-type]
    {Fetch: run_fetch, Preview: run_preview, Train: run_train}[type(chosen)](chosen)


if __name__ == "__main__":
    command.run(main)
