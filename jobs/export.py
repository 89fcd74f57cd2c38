"""Export a tracker's network: safetensors bundle, ONNX, torch.export, released layout; compared.

python jobs/export.py
python jobs/export.py --model models:/lorat@champion --output export
"""

from __future__ import annotations

import bootstrap  # noqa: F401

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import command
import flags
import torch

from lorat.checkpoint.export import FORMATS, TOLERANCE, check_place, export
from lorat.checkpoint.folder import save_backbone
from lorat.errors import without_surrogates
from lorat.files.outputs import check_file
from lorat_platform.evaluation.report import markdown_table
from lorat_platform.registry import versions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write deployable files of a model and compare each with PyTorch."""

    model: str | None = None
    """Registered model, run, checkpoint folder, or released file; none means
    models:/lorat@champion, or else models:/lorat@candidate."""
    variant: str | None = None
    """Variant of a released file, which does not name it."""
    output: Path = Path("export")
    """Folder for bundle/, model.onnx, model.pt2, official.safetensors, and parity.json and .md."""
    formats: tuple[Literal["bundle", "onnx", "program", "official"], ...] = FORMATS  # type: ignore[assignment]
    """What to write; official is a file as LoRAT releases them."""
    backbone: Path | None = None
    """Also write the transformer alone to this .safetensors file, in float16 and DINOv2's layout:
    what --backbone of jobs/train.py takes."""


def main() -> int:
    """Run the job; 1 if a file differs from PyTorch by more than the tolerance."""
    options = flags.parse(Options, description=__doc__)
    check_place(options.output, options.formats)
    if options.backbone is not None:
        check_file(options.backbone)
    uri = options.model or versions.usual()
    model = versions.load(uri, variant=options.variant)
    if options.backbone is not None:
        options.backbone.parent.mkdir(parents=True, exist_ok=True)
        save_backbone(model, options.backbone, dtype=torch.float16)
    reports = export(model, options.output, options.formats)
    rows = [
        [r.format, r.file, f"{r.megabytes:.2f}", f"{r.max_score_error:.2e}",
         f"{r.max_box_error:.2e}", f"{r.milliseconds:.1f}", "yes" if r.passed else "NO"]
        for r in reports
    ]  # fmt: skip
    header = ["format", "file", "MB", "score error", "box error", "ms per pair", "same"]
    text = f"{uri} ({model.variant.name}), tolerance {TOLERANCE:g}\n\n"
    text += markdown_table(header, rows) + "\n"
    (options.output / "parity.md").write_text(without_surrogates(text))
    log.info("%s\nfiles   %s", text, options.output)
    return 0 if all(report.passed for report in reports) else command.EXIT_FAILURE


if __name__ == "__main__":
    command.run(main)
