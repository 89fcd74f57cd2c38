"""What is unusual about a result set, cause by cause, and the boxes once each is mended.

A file's first row is the given box in every published layout; that tells the form of the boxes
exactly, whichever tracker it was.  What it cannot tell (frames out of step) is seen beside the
results that it is compared with, or beside the annotation.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lorat.image.boxes import xyxy_from_xywh
from lorat.metrics.alignment import ROW_EVERY, Alignment, align, shift_of_all, step_of_all
from lorat.metrics.conventions import FORMS, TRUSTED, Convention, rows_iou
from lorat.metrics.diagnosis import NOWHERE, Diagnosis, in_frames, naive_boxes
from lorat.metrics.dialects import GroundTruth
from lorat.metrics.raw_results import RawFile, RawResults
from lorat.metrics.reading import first_row, frame_size, own_convention, set_convention

SAME = 0.98
"""Overlap from which two boxes are the same but for rounding."""

FROZEN = 0.2
"""Share of a sequence that one box must last to be remarked."""


def diagnose(
    raw: RawResults,
    truths: Mapping[str, GroundTruth],
    other: Mapping[str, np.ndarray],
    *,
    custom: float,
) -> Diagnosis:
    """Find what is unusual about result files.

    Args:
        raw: the files.
        truths: annotation of every sequence.
        other: boxes (n, 4) xyxy of the results that they are compared with; frames that cannot be
            mended are taken from them, so that they make no difference any more.
        custom: coordinate of the first pixel in the files of this data set.
    """
    found = Diagnosis(naive=naive_boxes(raw, truths, custom))
    files = _named_files(raw, truths, found)
    shared = set_convention(files, truths, other, custom)
    files, moved = _unmixed(files, truths, shared, other, found)
    conventions = {
        name: own_convention(file, truths[name], shared[name], custom)
        for name, file in files.items()
    }
    tracks = {n: conventions[n].read(f.rows, frame_size(truths[n])) for n, f in files.items()}
    names = [n for n in tracks if len(tracks[n]) == len(truths[n].boxes)]
    shift = shift_of_all(
        [tracks[n] for n in names],
        [truths[n].boxes[0] for n in names],
        min((_tolerance_px(files[n]) for n in names), default=1.0),
    )
    aligned = _alignments(files, conventions, truths, other, shift)
    for name, truth in truths.items():
        if name in files:
            _diagnose_one(
                name, files[name], truth, other[name], conventions[name], found, custom=custom,
                moved=name in moved, alignment=aligned.get(name),
            )  # fmt: skip
        elif name not in found.mended:
            found.note("missing files", "no file", name)
            found.mend(name, "missing files", other[name])
    _note_text(raw, files, found)
    _note_rounding(files, truths, found)
    _drop_habits(found, len(files))
    return found


def _named_files(
    raw: RawResults, truths: Mapping[str, GroundTruth], found: Diagnosis
) -> dict[str, RawFile]:
    """Return the files by sequence, those with strange names by their first boxes."""
    files = {name: file for name, file in raw.files.items() if name in truths}
    for name, other_name in raw.other_names.items():
        if name in files:
            found.note("sequence names", f"other names, such as {other_name}", name)
    missing = [name for name in truths if name not in files]
    strangers = [file for file in raw.unread.values() if first_row(file) is not None]
    if missing and strangers:
        for name, file in _by_first_boxes(missing, strangers, truths).items():
            files[name] = file
            found.note("sequence names", f"other names, such as {file.path}", name)
    left = [path for path in raw.unknown if all(file.path != path for file in files.values())]
    if left:
        text = f"{len(left)} files of no sequence, such as {left[0]}"
        found.note("sequence names", text, "")
    return files


def _by_first_boxes(
    missing: list[str], strangers: list[RawFile], truths: Mapping[str, GroundTruth]
) -> dict[str, RawFile]:
    """Match files with sequences by their first boxes, in the form that matches most."""
    givens = np.array([truths[name].boxes[0] for name in missing])
    sizes = np.array([frame_size(truths[name]) for name in missing])
    lengths = np.array([len(truths[name].boxes) for name in missing])
    best: dict[str, RawFile] = {}
    for form in FORMS.values():
        matched: dict[str, RawFile] = {}
        is_free = np.ones(len(missing), dtype=bool)
        for file in strangers:
            row = first_row(file)
            assert row is not None
            fits = rows_iou(form(np.tile(row, (len(missing), 1)), sizes), givens)
            fits = np.where(is_free, fits - 0.2 * (lengths != len(file.rows)), -1.0)
            place = int(fits.argmax())
            if fits[place] >= TRUSTED - 0.2:
                matched[missing[place]] = file
                is_free[place] = False
        if len(matched) > len(best):
            best = matched
    return best


def _unmixed(
    files: Mapping[str, RawFile],
    truths: Mapping[str, GroundTruth],
    conventions: Mapping[str, Convention],
    other: Mapping[str, np.ndarray],
    found: Diagnosis,
) -> tuple[dict[str, RawFile], set[str]]:
    """Give each sequence the file that begins with its box; return which were moved."""
    first = {
        name: conventions[name].read(row[None], frame_size(truths[name]))
        for name, file in files.items()
        if (row := first_row(file)) is not None
    }
    givens = np.array([truth.boxes[0] for truth in truths.values()])
    lost = [name for name, box in first.items() if rows_iou(box, truths[name].boxes[:1])[0] < 0.5]
    fits = {
        name: dict(
            zip(truths, rows_iou(np.repeat(first[name], len(givens), axis=0), givens), strict=True)
        )
        for name in lost
    }
    kept, moved = dict(files), set()
    for name in lost:
        # The file that begins with this sequence's box, of those that fit nothing of their own.
        sources = [n for n in lost if n != name and fits[n][name] >= TRUSTED]
        if sources:
            source = max(sources, key=lambda n: fits[n][name])
            kept[name] = files[source]
            moved.add(name)
            pair = " and ".join(sorted((name, source)))
            found.note("sequences mixed up", f"results swapped: {pair}", name)
            continue
        owners = [
            n
            for n in first
            if n != name and fits[name][n] >= TRUSTED
            and files[n].rows.shape == files[name].rows.shape
            and np.array_equal(files[n].rows, files[name].rows, equal_nan=True)
        ]  # fmt: skip
        if owners:
            found.note("sequences mixed up", f"holds the results of {owners[0]}", name)
            del kept[name]
            found.mend(name, "sequences mixed up", other[name])
    return kept, moved


def _tolerance_px(file: RawFile) -> float:
    """Return how far a first row may be from the given box and still be it."""
    return 0.05 if file.decimals else 1.0


def _is_absent(truth: GroundTruth) -> np.ndarray:
    return ~truth.visibility | ~np.isfinite(truth.boxes).all(axis=1)


def _alignments(
    files: Mapping[str, RawFile],
    conventions: Mapping[str, Convention],
    truths: Mapping[str, GroundTruth],
    other: Mapping[str, np.ndarray],
    shift: int,
) -> dict[str, Alignment]:
    """Find the frames of the rows of all files that have some; what most have tells the others."""

    def find(name: str, text: str = "") -> Alignment:
        truth, found = truths[name], Alignment(row=np.arange(len(truths[name].boxes)))
        rows = files[name].placed(len(truth.boxes))
        boxes = conventions[name].read(rows, frame_size(truth))
        known = np.where((other[name] == NOWHERE).all(axis=1)[:, None], np.nan, other[name])
        for anchor in (known, truth.boxes):
            if not found.kind:
                found = align(
                    boxes, anchor, truth.boxes[0], _is_absent(truth),
                    tolerance_px=_tolerance_px(files[name]), told_shift=shift, told_text=text,
                )  # fmt: skip
        return found

    names = [name for name, file in files.items() if np.isfinite(file.rows).any()]
    lengths = [len(truths[name].boxes) for name in names]
    step = step_of_all([len(files[name].rows) for name in names], lengths)
    told = ROW_EVERY.format(step) if step > 1 else ""
    aligned = {name: find(name, told) for name in names}
    texts = [alignment.text for alignment in aligned.values() if alignment.kind]
    most = max(set(texts), key=texts.count, default="")
    if most and texts.count(most) > 0.5 * len(names):
        aligned |= {name: find(name, most) for name in names if aligned[name].text != most}
    return aligned


def _diagnose_one(
    name: str,
    file: RawFile,
    truth: GroundTruth,
    other: np.ndarray,
    convention: Convention,
    found: Diagnosis,
    *,
    custom: float,
    moved: bool,
    alignment: Alignment | None,
) -> None:
    num, size = len(truth.boxes), frame_size(truth)
    if alignment is None:
        found.note("missing files", "an empty file, or none that can be read", name)
        found.mend(name, "missing files", other)
        return
    rows = file.placed(num)
    boxes = xyxy_from_xywh(rows) - custom

    def mend(kind: str) -> None:
        found.mend(name, kind, in_frames(boxes, num))

    if name in {n for c in found.causes if c.kind == "sequence names" for n in c.sequences}:
        mend("sequence names")
    if file.is_empty.any():
        mend("text of the files")
    if moved:
        mend("sequences mixed up")
    words = convention.described(custom)
    if words:
        boxes = convention.read(rows, size)
        for text in words:
            found.note("boxes' convention", text, name)
        mend("boxes' convention")
    if alignment.kind:
        found.note(alignment.kind, alignment.text, name)
        boxes = np.where((alignment.row >= 0)[:, None], boxes[alignment.row], NOWHERE)
        unknown = alignment.row < 0
        boxes[unknown] = other[unknown]
        if unknown[0] and alignment.kind == "first frame":
            boxes[0] = truth.boxes[0]
        mend(alignment.kind)
    elif len(boxes) != num:
        short = len(boxes) < num
        kind = "short files" if short else "long files"
        found.note(kind, "fewer rows than frames" if short else "more rows than frames", name)
        boxes = np.concatenate([boxes[:num], other[len(boxes) :]])
        mend(kind)
    _diagnose_rows(name, boxes, truth, other, found, tolerance=_tolerance_px(file))


def _diagnose_rows(
    name: str,
    boxes: np.ndarray,
    truth: GroundTruth,
    other: np.ndarray,
    found: Diagnosis,
    *,
    tolerance: float,
) -> None:
    """Look at boxes (n, 4), each of its own frame."""
    is_absent = _is_absent(truth)
    sides = boxes[:, 2:] - boxes[:, :2]
    if np.abs(boxes[0] - truth.boxes[0]).max() > tolerance and rows_iou(boxes[:1], truth.boxes[:1])[
        0
    ] < (SAME if tolerance < 1 else TRUSTED):
        found.note("first frame", "another box than the given one", name)
        boxes = np.concatenate([truth.boxes[:1], boxes[1:]])
        found.mend(name, "first frame", boxes)
    is_no_number = ~np.isfinite(boxes).all(axis=1)
    is_zero = ~is_no_number & (np.abs(sides) < 1e-9).all(axis=1)
    is_negative = ~is_no_number & ~is_zero & ~(sides > 0).all(axis=1)
    for which, what in (
        (is_no_number, "rows of NaN, or of no numbers"),
        (is_zero, "rows of zeros, or of boxes without sides"),
        (is_negative, "boxes with negative sides"),
    ):
        if not which.any():
            continue
        of_absent = is_absent.any() and (which & is_absent).sum() >= 0.9 * which.sum()
        kind = "absent frames" if of_absent else "rows without a box"
        found.note(kind, f"{what}{' where no target is' if of_absent else ''}", name)
        boxes = np.where(which[:, None], other, boxes)
        found.mend(name, kind, boxes)
    start = _frozen_from(boxes)
    moves = float(np.nanmax(np.abs(np.diff(truth.boxes, axis=0)), initial=0.0)) > 0.5
    # A tracker that has lost its target may stay where it is; one that is on it does not stop.
    is_on_it = start and rows_iou(boxes[start : start + 1], truth.boxes[start : start + 1])[0] > 0.5
    if moves and is_on_it and start < len(boxes) - max(10, FROZEN * len(boxes)):
        found.note("same box again", "one box to the end, though the target moves", name)
        boxes = np.concatenate([boxes[:start], other[start:]])
        found.mend(name, "same box again", boxes)


def _frozen_from(boxes: np.ndarray) -> int:
    """Return the first frame of the run of equal boxes at the end; 0 if all are equal."""
    differs = np.flatnonzero((boxes[1:] != boxes[:-1]).any(axis=1))
    return int(differs[-1] + 1) if len(differs) else 0


def _note_text(raw: RawResults, files: Mapping[str, RawFile], found: Diagnosis) -> None:
    usual = {"tabs", "commas"}
    kinds = [file.separator for file in files.values()]
    most = max(set(kinds), key=kinds.count) if kinds else "commas"
    for name, file in files.items():
        for oddity in file.oddities:
            words = oddity.lstrip("0123456789 ") if "empty" in oddity else oddity
            found.note("text of the files", words, name)
        if file.separator not in usual | {"nothing"}:
            text = f"separator: {file.separator}, where commas or tabs are usual"
            found.note("text of the files", text, name)
        elif file.separator != most and file.separator in usual:
            text = f"separator: {file.separator}, where the others have {most}"
            found.note("text of the files", text, name)
        if name in raw.several_runs:
            found.note("text of the files", "several runs, of which the first is taken", name)


def _note_rounding(
    files: Mapping[str, RawFile], truths: Mapping[str, GroundTruth], found: Diagnosis
) -> None:
    if not any(np.any(truths[name].boxes % 1) for name in files):
        return  # the annotation is of whole pixels, and so may be what a tracker says
    for name, file in files.items():
        rows = file.rows[np.isfinite(file.rows).all(axis=1)]
        if len(rows) < 3 or not np.ptp(rows, axis=0).any():
            continue
        for decimals, text in ((0, "whole pixels"), (1, "one decimal")):
            # The given box, which may stand in more than one row, is not the tracker's.
            if (rows == np.round(rows, decimals)).all(axis=1).sum() >= len(rows) - 2:
                found.note("rounding", text, name)
                break


def _drop_habits(found: Diagnosis, num_files: int) -> None:
    """Drop what is a tracker's own way, not a fault: one that never moves repeats its box."""
    habits = [c for c in found.causes if c.kind == "same box again"]
    for cause in habits:
        if len(cause.sequences) > 0.5 * max(num_files, 1):
            found.causes.remove(cause)
            for name in cause.sequences:
                found.mended[name] = [s for s in found.mended[name] if s[0] != cause.kind]
