"""Raw results that others have published, beside trackers that run here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorat.errors import UserError, named
from lorat.metrics.diagnosis import naive_boxes
from lorat.metrics.dialects import first_pixel
from lorat.metrics.raw_results import PREFIX, read_results
from lorat.tracking.one_pass import SequenceResult, ground_truth
from lorat_platform.evaluation.sets import (
    DatasetResult,
    chosen_tracks,
    open_full_frames,
    scored,
)
from lorat_platform.evaluation.workers import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class Published:
    """The result files of a tracker, which is not run here; in the place of a subject."""

    name: str
    """How people call it."""
    fingerprint: str
    """Hash of the address."""
    folder: Path
    """Or zip."""
    variant: None = None
    model: None = None


def published(address: str) -> Published:
    """Return the results that ``results:FOLDER`` names.

    Raises:
        UserError: if there is no such folder or zip.
    """
    folder = Path(address.removeprefix(PREFIX)).expanduser()
    if not folder.exists():
        raise UserError(
            f"There is no {named(folder)}; give results:FOLDER with a tracker's result files."
        )
    digest = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()
    return Published(name=named(address), fingerprint=digest, folder=folder)


def read(
    entrant: Published, uri: str, config: EvaluationConfig, *, as_they_are: bool = False
) -> DatasetResult:
    """Score published results on a data set, as far as they fit it.

    Args:
        entrant: the results.
        uri: shards with full frames.
        config: which sequences.
        as_they_are: score every sequence, by the data set's custom, and frames without a row as
            failures; otherwise sequences without a file, or with another number of rows than
            frames, are left out and named, and the first boxes tell whether files are 1-based.

    Raises:
        UserError: if the files cannot be read, or none fits.
    """
    index = open_full_frames(uri)
    tracks, left_out = chosen_tracks(index, config)
    names = {index.sequence(track): track for track in tracks}
    truths = {name: ground_truth(index, track) for name, track in names.items()}
    raw = read_results(entrant.folder, list(names), index.name)
    boxes, without = raw.boxes(truths, index.name)
    if as_they_are:
        boxes, without = naive_boxes(raw, truths, first_pixel(index.name)), {}
    if not boxes:
        name, why = next(iter(without.items()))
        raise UserError(
            f"No result of {entrant.name} fits {index.uri} (of {name}: {why}); give the results of "
            "this data set."
        )
    results = {
        name: SequenceResult(
            track=track,
            name=name,
            boxes=boxes[name],
            scores=np.full(len(boxes[name]), np.nan),
            seconds=np.full(len(boxes[name]), np.nan),
            decode_seconds=np.full(len(boxes[name]), np.nan),
        )
        for name, track in names.items()
        if name in boxes
    }
    return scored(index, results, left_out | without)
