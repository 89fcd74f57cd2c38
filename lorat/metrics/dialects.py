"""The rules of each toolkit: which frames count, and what an absent target is worth.

Every dialect turns ground truth and predictions (xyxy, 0-based) into :class:`FrameErrors`; the
curves over thresholds are the same for all but for strictness.
The oddities are those of the published numbers and are kept on purpose.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lorat.image.boxes import xywh_from_xyxy
from lorat.metrics.overlap import center_error, iou, normalized_center_error


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The annotation of one sequence of n frames."""

    boxes: np.ndarray
    """(n, 4) xyxy, 0-based pixels; NaN rows where the target is absent."""
    visible: np.ndarray | None = None
    """bool (n,): neither fully occluded nor out of view; none means always."""
    cover: np.ndarray | None = None
    """GOT-10k's cover label 0 to 8 (n,); 0 means not visible at all."""
    size_wh: np.ndarray | None = None
    """Frame size (2,) or (n, 2), for dialects that clip boxes to the frame."""

    @property
    def visibility(self) -> np.ndarray:
        """``visible`` as an array, all true where it is not given."""
        if self.visible is None:
            return np.ones(len(self.boxes), dtype=bool)
        return np.asarray(self.visible, dtype=bool)


@dataclass(frozen=True, kw_only=True)
class FrameErrors:
    """Overlap and errors of the frames that enter the curves."""

    overlap: np.ndarray
    """IoU; negative or NaN is a failure at every threshold."""
    center_px: np.ndarray
    """Distance of the centres; infinite or NaN is a failure, negative a success everywhere."""
    center_norm: np.ndarray
    """The same, divided by the true box size per axis."""
    num_frames: int
    """Denominator of all rates."""
    frame_iou: np.ndarray
    """(n,) IoU of every frame of the sequence, for reports; -1 where it has no meaning."""
    coverage: float = 1.0
    """Share of frames with a prediction."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one toolkit scores."""

    frames: Callable[[GroundTruth, np.ndarray, str], FrameErrors]
    """Rules per frame, from annotation, predicted xyxy boxes and data set name."""
    strict: bool = True
    """Success needs IoU > threshold; otherwise >=."""
    zero_fails: bool = False
    """An IoU of 0 fails the threshold 0, too."""
    success_thresholds: np.ndarray = dataclasses.field(
        default_factory=lambda: np.linspace(0, 1, 21)
    )
    """Thresholds of the success curve in [0, 1]."""
    num_precision: int = 51
    """Thresholds of the precision curve in [0, 50] px."""
    norm_thresholds: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(51) / 100)
    """Thresholds of the normalised precision curve in [0, 0.5], rounded as the toolkit rounds."""
    single: bool = False
    """Curves are float32, as stored by the toolkit."""
    pooled: bool = False
    """AO, success rates and curves of the data set are taken over the frames of all sequences."""
    trapezoid: bool = False
    """P and P_norm are areas under their curves, as SUC is, by the trapezoid rule."""
    missing_allowed: bool = False
    """Missing sequences and rows are failures rather than errors."""


def family(dataset: str) -> str:
    """Return a data set's name without case, punctuation and abbreviations: LaSOT_Extension."""
    name = re.sub(r"[^a-z0-9]", "", dataset.lower())
    for known in ("lasotextension", "lasotext", "lasot", "vasttrack", "uav", "otb", "nfs", "tc128"):
        if name.startswith(known):
            return "lasotextension" if known == "lasotext" else known
    return name


def first_pixel(dataset: str) -> float:
    """Return the index of the first pixel in the toolkit's own files of a data set."""
    return 1.0 if family(dataset) in ("lasot", "vasttrack", "otb") else 0.0


def _repaired(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Start with the annotation; replace what is no box by the box before."""
    predicted = predicted.copy()
    predicted[0] = truth[0]
    bad = ~(predicted[:, 2:] > 0).all(axis=1) | np.isnan(predicted).any(axis=1)
    bad[0] = False
    source = np.maximum.accumulate(np.where(bad, 0, np.arange(len(bad))))
    return predicted[source]


def _compatible(truth: GroundTruth, predicted: np.ndarray, dataset: str) -> FrameErrors:
    """Follow the tools around pytracking and STARK, which LoRAT reports with."""
    kind = family(dataset)
    offset = 1.0 if kind in ("lasot", "vasttrack") else 0.0
    gt = xywh_from_xyxy(truth.boxes + offset)
    result = xywh_from_xyxy(predicted + offset)
    valid = (gt[:, 2:] > 0).all(axis=1)
    if kind in ("lasot", "lasotextension", "vasttrack"):
        valid &= truth.visibility
    overlap, center, norm = _errors(gt, result, inclusive=True)
    overlap[~valid] = -1
    center[~valid] = -1 if kind == "uav" else np.inf
    norm[~valid] = -1
    if kind in ("lasot", "vasttrack"):
        center[~truth.visibility] = norm[~truth.visibility] = np.inf
    return _all_frames(overlap, center, norm)


def _plain(truth: GroundTruth, predicted: np.ndarray, dataset: str) -> FrameErrors:
    """Count only frames with a visible target; a prediction that is no box fails."""
    gt, result = xywh_from_xyxy(truth.boxes), xywh_from_xyxy(predicted)
    counted = (gt[:, 2:] > 0).all(axis=1) & truth.visibility
    overlap, center, norm = _errors(gt, result, shift=0.0)
    frame_iou = np.where(counted, overlap, 0.0)
    broken = ~(result[:, 2:] > 0).all(axis=1)
    frame_iou[broken] = 0.0
    overlap[broken] = 0.0
    center[broken] = norm[broken] = np.inf
    return FrameErrors(
        overlap=overlap[counted],
        center_px=center[counted],
        center_norm=norm[counted],
        num_frames=int(counted.sum()),
        frame_iou=frame_iou,
    )


def _otb(truth: GroundTruth, predicted: np.ndarray, dataset: str) -> FrameErrors:
    """Follow the OTB toolkit (MATLAB): repaired predictions; bad annotations count as precise."""
    gt = xywh_from_xyxy(truth.boxes + 1.0)
    result = _repaired(gt, xywh_from_xyxy(predicted + 1.0))
    overlap, center, norm = _errors(gt, result, inclusive=True)
    bad = ~(gt > 0).all(axis=1)
    overlap[bad] = center[bad] = norm[bad] = -1
    return _all_frames(overlap, center, norm)


def _pysot(truth: GroundTruth, predicted: np.ndarray, dataset: str) -> FrameErrors:
    """Follow pysot-toolkit: no repair; absent frames of LaSOT leave only the denominator."""
    gt = xywh_from_xyxy(truth.boxes + first_pixel(dataset))
    result = xywh_from_xyxy(predicted + first_pixel(dataset))
    overlap, center, norm = _errors(gt, result)
    overlap[~(gt > 0).all(axis=1)] = -1
    middle = gt[:, :2] + 0.5 * (gt[:, 2:] - 1)
    center[~(middle > 0).all(axis=1)] = -1
    with np.errstate(divide="ignore", invalid="ignore"):
        norm[~(middle / gt[:, 2:] > 0).all(axis=1)] = -1
    return _without_absent(truth, overlap, center, norm)


def _lasot(truth: GroundTruth, predicted: np.ndarray, dataset: str) -> FrameErrors:
    """Follow the LaSOT toolkit: as OTB's, without the absent frames but over all frames."""
    gt = xywh_from_xyxy(truth.boxes + 1.0)
    result = _repaired(gt, xywh_from_xyxy(predicted + 1.0))
    overlap, center, norm = _errors(gt, result, inclusive=True)
    bad = ~(gt > 0).all(axis=1)
    overlap[bad] = center[bad] = norm[bad] = -1
    return _without_absent(truth, overlap, center, norm)


def _pytracking(truth: GroundTruth, predicted: np.ndarray, dataset: str) -> FrameErrors:
    """Follow pytracking: repaired predictions; a bad annotation is precise only after scaling."""
    kind = family(dataset)
    gt = xywh_from_xyxy(truth.boxes + first_pixel(dataset))
    result = _repaired(gt, xywh_from_xyxy(predicted + first_pixel(dataset)))
    overlap, center, norm = _errors(gt, result, inclusive=True)
    bad = ~(gt > 0).all(axis=1)
    hidden = ~truth.visibility if kind == "lasot" else np.zeros(len(gt), dtype=bool)
    bad |= hidden
    overlap[bad] = -1
    center[bad] = -1 if kind == "uav" else np.inf
    norm[bad] = -1
    center[hidden] = norm[hidden] = np.inf
    return _all_frames(overlap, center, norm)


def _got10k_otb(truth: GroundTruth, predicted: np.ndarray, dataset: str) -> FrameErrors:
    """Follow the OTB experiment of the got10k package: no masks at all."""
    gt = xywh_from_xyxy(truth.boxes + 1.0)
    overlap, center, norm = _errors(gt, xywh_from_xyxy(predicted + 1.0))
    return _all_frames(np.nan_to_num(overlap), center, norm)


def _got10k(truth: GroundTruth, predicted: np.ndarray, dataset: str) -> FrameErrors:
    """Follow the GOT-10k toolkit: without the first frame, boxes clipped, covered frames only."""
    gt, result = xywh_from_xyxy(truth.boxes), xywh_from_xyxy(predicted)
    center, norm = center_error(gt, result), normalized_center_error(gt, result)
    if truth.size_wh is not None:
        size_wh = np.broadcast_to(np.asarray(truth.size_wh, dtype=np.float64), (len(gt), 2))
        gt, result = _clip_as_got10k(gt, size_wh), _clip_as_got10k(result, size_wh)
    overlap = np.nan_to_num(iou(gt, result)).clip(0, 1)
    counted = np.ones(len(gt), dtype=bool) if truth.cover is None else np.asarray(truth.cover) > 0
    counted = counted & ~np.isnan(gt).any(axis=1)
    if truth.cover is None:
        counted &= truth.visibility
    counted[0] = False
    return FrameErrors(
        overlap=overlap[counted],
        center_px=center[counted],
        center_norm=norm[counted],
        num_frames=int(counted.sum()),
        frame_iou=overlap,
    )


def _clip_as_got10k(boxes: np.ndarray, size_wh: np.ndarray) -> np.ndarray:
    """Move the corner inside the frame without shortening the box, then cut what sticks out."""
    corner = np.clip(boxes[:, :2], 0, size_wh)
    return np.concatenate([corner, np.clip(boxes[:, 2:], 0, size_wh - corner)], axis=1)


def _trackingnet(truth: GroundTruth, predicted: np.ndarray, dataset: str) -> FrameErrors:
    """Follow TrackingNet's script: everything rounded to whole pixels first."""
    # A width of 247.5 is 247.49999 after the way to corners (float32 in shards) and back, and would
    # be rounded down; digits beyond those that files have are cut off first.
    gt = np.round(np.round(xywh_from_xyxy(truth.boxes), 3))
    result = np.round(np.round(xywh_from_xyxy(predicted), 3))
    result[0] = gt[0]
    errors = _all_frames(*_errors(gt, result))
    given = float((result.sum(axis=1) > 0).mean())
    return FrameErrors(
        overlap=errors.overlap,
        center_px=errors.center_px,
        center_norm=errors.center_norm,
        num_frames=errors.num_frames,
        frame_iou=errors.frame_iou,
        coverage=given,
    )


def _errors(
    gt: np.ndarray, result: np.ndarray, *, shift: float = 1.0, inclusive: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        iou(gt, result, inclusive),
        center_error(gt, result, shift),
        normalized_center_error(gt, result, shift),
    )


def _all_frames(overlap: np.ndarray, center: np.ndarray, norm: np.ndarray) -> FrameErrors:
    return FrameErrors(
        overlap=overlap,
        center_px=center,
        center_norm=norm,
        num_frames=len(overlap),
        frame_iou=np.nan_to_num(overlap, nan=-1.0),
    )


def _without_absent(
    truth: GroundTruth, overlap: np.ndarray, center: np.ndarray, norm: np.ndarray
) -> FrameErrors:
    present = truth.visibility
    return FrameErrors(
        overlap=overlap[present],
        center_px=center[present],
        center_norm=norm[present],
        num_frames=len(overlap),
        frame_iou=np.where(present, np.nan_to_num(overlap, nan=-1.0), -1.0),
    )


def _matlab_colon() -> np.ndarray:
    """Return MATLAB's ``0:0.05:1``: the upper half is counted down from the end.

    So its 0.65 lies one rounding below the number 0.65, and an overlap of 0.65 exceeds it.
    """
    steps = np.arange(11) * 0.05
    return np.concatenate([steps, (1 - steps)[9::-1]])


DIALECTS: dict[str, Dialect] = {
    "compatible": Dialect(frames=_compatible, single=True),
    "plain": Dialect(
        frames=_plain, strict=False, zero_fails=True, norm_thresholds=np.linspace(0, 0.5, 51)
    ),
    "otb": Dialect(frames=_otb, success_thresholds=_matlab_colon()),
    "pysot": Dialect(frames=_pysot),
    "lasot": Dialect(frames=_lasot, success_thresholds=_matlab_colon()),
    "pytracking": Dialect(frames=_pytracking, single=True),
    "got10k_otb": Dialect(frames=_got10k_otb),
    "got10k": Dialect(frames=_got10k, success_thresholds=np.linspace(0, 1, 101), pooled=True),
    "trackingnet": Dialect(
        frames=_trackingnet,
        strict=False,
        num_precision=21,
        norm_thresholds=np.linspace(0, 0.5, 21),
        trapezoid=True,
        missing_allowed=True,
    ),
}
"""All dialects by name; ``compatible`` is the one of the LoRAT paper."""
