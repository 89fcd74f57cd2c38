"""Stored windows: how much of a frame training needs, and in which resolution.

A search crop is a jittered square around the target (LoRAT, section 4.1 and its SiamFC cropping).
The window is the smallest part of the frame, around the target, that all but a given share of the
accepted search crops stay inside, where the part of a crop outside the frame does not count.  It
is found from a fixed sample of the jitter law.  It is reduced to the resolution of the crop
without jitter, never enlarged.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import cv2
import numpy as np

from lorat.config.bounds import Bounds, Share, check_bounds
from lorat.config.training import SamplingConfig
from lorat.config.variants import AreaFactor, Side, Variant
from lorat.image.jpeg_regions import SEGMENT_WIDTH

_NUM_SAMPLES = 20_000
_RATIO_STEPS = 8
"""Steps per doubling of the aspect ratio at which the law is sampled."""
_MAX_LOG_RATIO = 5.0
_ABSENT_SIDE = 64
"""Largest side of the picture kept for a frame without usable box, which is never a sample."""

Window = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class WindowLaw:
    """The crops that a windowed dataset serves; sizes in crop pixels."""

    search_size: Side = 224
    """Side of the search crop, 1 to 2048."""
    search_area_factor: AreaFactor = 4.0
    """How much context the search crop shows, 1 to 100; 1 is none."""
    template_size: Side = 112
    """Side of the template crop, 1 to 2048."""
    template_area_factor: AreaFactor = 2.0
    """The same of the template crop, 1 to 100."""
    scale_jitter: Annotated[float, Bounds(0, 2)] = 0.25
    """Standard deviation of the log scale, per axis, 0 to 2."""
    translation_jitter: Annotated[float, Bounds(0, 100)] = 3.0
    """Largest shift, 0 to 100 mean box sides."""
    min_object_size: Annotated[float, Bounds(0, 1000)] = 10.0
    """Crops showing less of the target than this, per axis, are drawn again, 0 to 1000."""
    max_outside: Share = 0.01
    """Largest share of search crops that may reach outside the window, 0 to 1."""

    def __post_init__(self) -> None:
        check_bounds(self, "window.{}".format)

    @classmethod
    def for_variant(cls, variant: Variant) -> WindowLaw:
        """Return the law that serves a variant's crops."""
        return cls(
            search_size=variant.search_size,
            search_area_factor=variant.search_area_factor,
            template_size=variant.template_size,
            template_area_factor=variant.template_area_factor,
        )

    def serves(self, variant: Variant, sampling: SamplingConfig | None = None) -> bool:
        """Tell whether crops of ``variant`` stay inside this law's windows and resolution.

        Args:
            sampling: how crops are jittered; none means as published.
        """
        sampling = sampling or SamplingConfig()
        wanted = self.for_variant(variant)
        return (
            wanted.search_area_factor <= self.search_area_factor
            # A template is cut without jitter, so it lies inside the search crop around it.
            and wanted.template_area_factor <= self.search_area_factor
            and sampling.scale_jitter <= self.scale_jitter
            and sampling.translation_jitter <= self.translation_jitter
            and sampling.min_object_size >= self.min_object_size
            and all(_scale(r, 1, wanted) <= _scale(r, 1, self) for r in (1, 2, 4, 8, 16, 32))
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values for the manifest."""
        return asdict(self)


def crop_scale(width: float, height: float, area_factor: float, crop_size: int) -> float:
    """Return crop pixels per frame pixel of a crop without jitter around a box."""
    # The published crop: each side grows by the same margin, which makes it area_factor times as
    # large for a square box.
    margin = (area_factor - 1) * (width + height) / 2
    return crop_size / math.sqrt((width + margin) * (height + margin))


def needed_scale(width: float, height: float, law: WindowLaw) -> float:
    """Return the largest of the search and template scales, at most 1."""
    return min(1.0, _scale(width, height, law))


def _scale(width: float, height: float, law: WindowLaw) -> float:
    return max(
        crop_scale(width, height, law.search_area_factor, law.search_size),
        crop_scale(width, height, law.template_area_factor, law.template_size),
    )


@functools.lru_cache(maxsize=512)
def _reaches(log_ratio_step: int, law: WindowLaw) -> tuple[np.ndarray, np.ndarray]:
    """Sample how far crops reach from the box centre, in units of sqrt(width * height).

    Returns:
        Reach to the left, top, right and bottom (4, n), and the per-side proportions (4) of the
        window.
    """
    rng = np.random.default_rng([11, log_ratio_step + 1000])
    # Everything scales with the box, so that a box of area 1 stands for all of its ratio.
    side = math.sqrt(2 ** (log_ratio_step / _RATIO_STEPS))
    box_wh = np.array([side, 1 / side])
    scale = crop_scale(side, 1 / side, law.search_area_factor, law.search_size)
    # As lorat.data.pairs.sampler jitters crops: sides by a log-normal factor, the centre by up to
    # half of the jitter times the mean side; what shows too little of the box is drawn again.
    normal = rng.standard_normal((4 * _NUM_SAMPLES, 2))
    scale_xy = scale / np.exp(law.scale_jitter * normal)
    amplitude = 0.5 * law.translation_jitter * (box_wh * scale_xy).sum(axis=1, keepdims=True)
    shift = rng.uniform(-1, 1, scale_xy.shape) * amplitude
    half_crop = law.search_size / 2
    half_box = box_wh * scale_xy / 2
    seen = np.minimum(shift + half_box, half_crop) - np.maximum(shift - half_box, -half_crop)
    accepted = (seen >= law.min_object_size).all(axis=1)
    if accepted.sum() < _NUM_SAMPLES // 10:  # a sliver that sampling will hardly ever accept
        accepted[:] = True
    keep = np.flatnonzero(accepted)[:_NUM_SAMPLES]
    # From the box centre to the crop's sides, back in units of the box.
    low = (half_crop + shift[keep]) / scale_xy[keep]
    high = (half_crop - shift[keep]) / scale_xy[keep]
    reach = np.concatenate([low, high], axis=1).T
    per_axis = np.quantile(np.maximum(low, high), 1 - law.max_outside, axis=0)
    return np.ascontiguousarray(reach), np.tile(per_axis, 2)


def window_of(box_px: np.ndarray, size_wh: tuple[int, int], law: WindowLaw) -> Window:
    """Return the window around a box, xyxy in whole pixels, inside the frame.

    Args:
        box_px: xyxy in frame pixels, not empty.
        size_wh: size of the frame.
    """
    x1, y1, x2, y2 = (float(v) for v in box_px)
    width, height = max(x2 - x1, 1e-3), max(y2 - y1, 1e-3)
    log_ratio = min(max(math.log2(width / height), -_MAX_LOG_RATIO), _MAX_LOG_RATIO)
    reach, proportion = _reaches(round(log_ratio * _RATIO_STEPS), law)
    unit = math.sqrt(width * height)
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    border = np.maximum([cx, cy, size_wh[0] - cx, size_wh[1] - cy], 0) / unit
    # A crop that reaches over the frame's border needs nothing beyond it.  Of each sampled crop: by
    # which factor the window of these proportions must grow to hold it.
    needed = (np.minimum(reach, border[:, None]) / proportion[:, None]).max(axis=0)
    # A tenth of the allowance is kept back for the error of the sample.
    rank = math.ceil(len(needed) * (1 - 0.9 * law.max_outside)) - 1
    half = np.partition(needed, rank)[rank] * proportion * unit
    left, top = max(math.floor(cx - half[0]), 0), max(math.floor(cy - half[1]), 0)
    right, bottom = math.ceil(cx + half[2]), math.ceil(cy + half[3])
    right, bottom = min(right, size_wh[0]), min(bottom, size_wh[1])
    # A box at the very border still needs a window of some pixels.
    left, top = min(left, size_wh[0] - 1), min(top, size_wh[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def cut_window(
    image_HWC: np.ndarray, box_px: np.ndarray | None, law: WindowLaw
) -> tuple[Window, np.ndarray]:
    """Cut the window out of a frame and reduce it.

    Args:
        box_px: xyxy; none keeps a small picture of the whole frame, so that every frame of a
            track has its row.

    Returns:
        The window and the stored image.
    """
    height, width = image_HWC.shape[:2]
    if box_px is None:
        window = (0, 0, width, height)
        scale = min(1.0, _ABSENT_SIDE / max(width, height))
    else:
        window = window_of(box_px, (width, height), law)
        scale = needed_scale(box_px[2] - box_px[0], box_px[3] - box_px[1], law)
        window = _widen(window, width, scale)
    x1, y1, x2, y2 = window
    patch = image_HWC[y1:y2, x1:x2]
    stored_wh = (max(math.ceil((x2 - x1) * scale), 1), max(math.ceil((y2 - y1) * scale), 1))
    # Whole segments wide, so that regions of the image can be decoded alone; never enlarged.
    if scale < 1:
        stored_wh = (min(_round_up(stored_wh[0]), x2 - x1), stored_wh[1])
    if stored_wh != (x2 - x1, y2 - y1):
        patch = cv2.resize(patch, stored_wh, interpolation=cv2.INTER_AREA)
    return window, np.ascontiguousarray(patch)


def _round_up(pixels: int) -> int:
    """Round a width up to whole segments, so that regions of the image can be decoded alone."""
    return -(-pixels // SEGMENT_WIDTH) * SEGMENT_WIDTH


def _widen(window: Window, frame_width: int, scale: float) -> Window:
    """Widen a window that is not reduced to whole segments, as far as the frame goes."""
    x1, y1, x2, y2 = window
    if scale == 1:
        x2 = min(x1 + _round_up(x2 - x1), frame_width)
        x1 = max(x2 - _round_up(x2 - x1), 0)
    return x1, y1, x2, y2
