"""Why two results differ in their scores: an account, cause by cause, and what is left.

The gap is what a reader sees: the published results as their toolkit scores them, less our own in
the headline dialect.  It is split by mending one cause after the other on either side, so the
parts add up to it exactly; what is left is the difference of the trackers, sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorat.metrics.causes import diagnose
from lorat.metrics.conventions import rows_iou
from lorat.metrics.diagnosis import KINDS, Cause, Diagnosis, rounded
from lorat.metrics.dialects import DIALECTS, GroundTruth, first_pixel
from lorat.metrics.raw_results import RawResults
from lorat.metrics.scores import Evaluation, evaluate

APART = 0.5
"""Overlap of both results below which they follow different things."""
OURS, THEIRS = "ours", "theirs"
LEFT = "left: the trackers differ"
SPLIT = ("AO", "SUC")
"""Scores whose gap is split."""
LEFT_OUT = {"got10k": (True, True), "plain": (False, True)}
"""Dialects that do not count first frames, and those without a target, even as failures."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One line of the account."""

    cause: str
    """Kind, or ``dialect``."""
    text: str
    side: str
    """:data:`OURS` or :data:`THEIRS`; empty where it is of both."""
    num_sequences: int
    gap: dict[str, float]
    """What it makes of the gap, by score of :data:`SPLIT`."""


@dataclass(frozen=True, kw_only=True)
class SequenceGap:
    """Two results on one sequence, in the dialect of the account."""

    name: str
    num_frames: int
    ours: dict[str, float]
    """As the files are, by score of :data:`SPLIT`."""
    theirs: dict[str, float]
    left: dict[str, float]
    """Theirs less ours once every cause is mended."""
    apart_at: int | None
    """First frame where the mended boxes of both overlap by less than :data:`APART`, or none."""
    causes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Two results of one data set, compared."""

    dialect: str
    parts: list[Part]
    """They add up to the gap; the last one is what is left."""
    sequences: list[SequenceGap]
    """By the difference of AO, where we are furthest behind first."""
    boxes: dict[str, dict[str, np.ndarray]]
    """By side (``ours``, ``theirs``, and both mended), (n, 4) xyxy of each sequence."""
    causes: dict[str, list[Cause]]
    """What is unusual, by side."""

    @property
    def gap(self) -> dict[str, float]:
        """Theirs as their toolkit scores them less ours in the headline dialect."""
        return {name: sum(part.gap[name] for part in self.parts) for name in SPLIT}


def explain(
    ours: Mapping[str, np.ndarray] | RawResults,
    theirs: RawResults,
    truths: Mapping[str, GroundTruth],
    *,
    dataset: str,
    dialect: str,
    headline: str = "compatible",
) -> Explanation:
    """Explain the gap between our results and published ones.

    Args:
        ours: boxes (n, 4) xyxy, 0-based, of every annotated sequence, or result files.
        theirs: result files.
        truths: annotation of the sequences that are compared.
        dataset: its name, which decides conventions and dialects.
        dialect: in which both are scored.
        headline: dialect in which our score is read at first.
    """
    custom = first_pixel(dataset)
    first, second = _diagnose_both(ours, theirs, truths, custom)

    def scores(boxes: Mapping[str, np.ndarray], name: str = dialect) -> Evaluation:
        return evaluate(boxes, truths, dialect=name, dataset=dataset)

    parts = _dialect_parts(first.naive, truths, dataset, dialect, headline)
    before = _gap(scores(second.naive), scores(first.naive))
    state = {OURS: first.naive, THEIRS: second.naive}
    for kind in KINDS:
        for side, found in ((THEIRS, second), (OURS, first)):
            causes = [cause for cause in found.causes if cause.kind == kind]
            if not causes:
                continue
            # Nobody can unround: the other side is rounded as well.
            if kind == "rounding":
                other = OURS if side == THEIRS else THEIRS
                state[other] = _like_rounded(state[other], causes)
            else:
                state[side] = found.after(kind)
            after = _gap(scores(state[THEIRS]), scores(state[OURS]))
            change = {name: before[name] - after[name] for name in SPLIT}
            before = after
            names = {name for cause in causes for name in cause.sequences}
            text = "; ".join(_said(cause, len(truths)) for cause in causes)
            parts.append(
                Part(cause=kind, text=text, side=side, num_sequences=len(names), gap=change)
            )
    parts.append(Part(cause=LEFT, text="", side="", num_sequences=len(truths), gap=before))
    return Explanation(
        dialect=dialect,
        parts=parts,
        sequences=_sequences(first, second, state, truths, scores),
        boxes={
            OURS: first.naive,
            THEIRS: second.naive,
            f"{OURS}, mended": first.final(),
            f"{THEIRS}, mended": second.final(),
        },
        causes={OURS: first.causes, THEIRS: second.causes},
    )


def scores_by_dialect(
    found: Explanation, truths: Mapping[str, GroundTruth], *, dataset: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Return all scores by dialect and side, of the boxes as they are and mended."""
    return {
        dialect: {
            side: evaluate(boxes, truths, dialect=dialect, dataset=dataset).scores
            for side, boxes in found.boxes.items()
        }
        for dialect in DIALECTS
    }


def _diagnose_both(
    ours: Mapping[str, np.ndarray] | RawResults,
    theirs: RawResults,
    truths: Mapping[str, GroundTruth],
    custom: float,
) -> tuple[Diagnosis, Diagnosis]:
    """Look at each side beside the other one; files are first looked at beside the annotation."""
    annotation = {name: truth.boxes for name, truth in truths.items()}
    if isinstance(ours, RawResults):
        first = diagnose(ours, truths, annotation, custom=custom)
        second = diagnose(theirs, truths, first.final(), custom=custom)
        first = diagnose(ours, truths, second.final(), custom=custom)
        return first, diagnose(theirs, truths, first.final(), custom=custom)
    first = Diagnosis(naive={name: np.asarray(ours[name], np.float64) for name in truths})
    return first, diagnose(theirs, truths, first.naive, custom=custom)


def _gap(theirs: Evaluation, ours: Evaluation) -> dict[str, float]:
    return {name: theirs.scores[name] - ours.scores[name] for name in SPLIT}


def _said(cause: Cause, num_sequences: int) -> str:
    """Return a cause with the sequences that have it, in words."""
    num = len(cause.sequences)
    if num == 0:
        return cause.text
    where = "all" if num == num_sequences else ", ".join(cause.sequences[:3])
    return f"{cause.text} ({where}{f' and {num - 3} more' if 3 < num < num_sequences else ''})"


def _like_rounded(
    boxes: Mapping[str, np.ndarray], causes: Sequence[Cause]
) -> dict[str, np.ndarray]:
    changed = dict(boxes)
    for cause in causes:
        decimals = 1 if "decimal" in cause.text else 0
        for name in cause.sequences:
            changed[name] = rounded(changed[name], decimals)
    return changed


def _dialect_parts(
    boxes: Mapping[str, np.ndarray],
    truths: Mapping[str, GroundTruth],
    dataset: str,
    dialect: str,
    headline: str,
) -> list[Part]:
    """Split what the dialect alone makes of our own score: first frames, absent ones, the rest."""
    if dialect == headline:
        return []
    first, absent = LEFT_OUT.get(dialect, (False, False))
    parts: list[Part] = []
    now = evaluate(boxes, truths, dialect=headline, dataset=dataset).scores

    def add(text: str, then: Mapping[str, float]) -> None:
        nonlocal now
        change = {name: then[name] - now[name] for name in SPLIT}
        now = dict(then)
        text = f"{dialect}: {text}"
        parts.append(
            Part(cause="dialect", text=text, side="", num_sequences=len(truths), gap=change)
        )

    for text, leaving in (
        ("first frame not counted", (first, False)),
        ("absent frames not counted", (first, absent)),
    ):
        if leaving[0 if text.startswith("first") else 1]:
            fewer = _fewer_frames(boxes, truths, first=leaving[0], absent=leaving[1])
            add(text, evaluate(*fewer, dialect=headline, dataset=dataset).scores)
    rest = evaluate(boxes, truths, dialect=dialect, dataset=dataset).scores
    add("its other rules" if parts else "its rules", rest)
    return parts


def _fewer_frames(
    boxes: Mapping[str, np.ndarray],
    truths: Mapping[str, GroundTruth],
    *,
    first: bool,
    absent: bool,
) -> tuple[dict[str, np.ndarray], dict[str, GroundTruth]]:
    """Leave first frames, and those without a target, out of boxes and annotation."""
    fewer: dict[str, np.ndarray] = {}
    annotated: dict[str, GroundTruth] = {}
    for name, truth in truths.items():
        keep = np.ones(len(truth.boxes), dtype=bool)
        if first:
            keep[0] = False
        if absent:
            keep &= truth.visibility & np.isfinite(truth.boxes).all(axis=1)
            if truth.cover is not None:
                keep &= np.asarray(truth.cover) > 0
        if keep.any():
            fewer[name] = boxes[name][keep]
            annotated[name] = GroundTruth(
                boxes=truth.boxes[keep], visible=truth.visibility[keep], size_wh=truth.size_wh
                if truth.size_wh is None or np.ndim(truth.size_wh) < 2
                else np.asarray(truth.size_wh)[keep],
            )  # fmt: skip
    return fewer, annotated


def _sequences(
    first: Diagnosis,
    second: Diagnosis,
    state: Mapping[str, Mapping[str, np.ndarray]],
    truths: Mapping[str, GroundTruth],
    scores: Callable[[Mapping[str, np.ndarray]], Evaluation],
) -> list[SequenceGap]:
    ours, theirs = scores(first.naive).sequences, scores(second.naive).sequences
    left = {side: scores(boxes).sequences for side, boxes in state.items()}
    rows = []
    for name, truth in truths.items():
        both = rows_iou(state[OURS][name], state[THEIRS][name])
        apart = np.flatnonzero(both < APART)
        rows.append(
            SequenceGap(
                name=name,
                num_frames=len(truth.boxes),
                ours={score: ours[name].scores[score] for score in SPLIT},
                theirs={score: theirs[name].scores[score] for score in SPLIT},
                left={
                    score: left[THEIRS][name].scores[score] - left[OURS][name].scores[score]
                    for score in SPLIT
                },
                apart_at=int(apart[0]) if len(apart) else None,
                causes=tuple(
                    f"{side}: {cause.text}"
                    for side, found in ((OURS, first), (THEIRS, second))
                    for cause in found.causes
                    if name in cause.sequences
                ),
            )
        )
    return sorted(rows, key=lambda row: (row.ours["AO"] - row.theirs["AO"], row.name))
