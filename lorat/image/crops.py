"""Crop parameters and the pixel-aligned resampling of crops; NumPy and OpenCV only.

A crop is an axis-aligned scale and shift of the frame: ``crop_px = frame_px * (sx, sy) + (tx,
ty)``.  Functions on the sampling path take and return Python scalars, since tiny NumPy arrays cost
ten times as much.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import cv2
import numpy as np

from lorat.image.boxes import Box, clip_box, rasterize


class CropParams(NamedTuple):
    """Scale and shift of ``crop_px = frame_px * scale + shift``."""

    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float

    def apply(self, box: Box) -> Box:
        """Map a box from the frame to the crop."""
        sx, sy, tx, ty = self
        return (box[0] * sx + tx, box[1] * sy + ty, box[2] * sx + tx, box[3] * sy + ty)

    def inverse(self) -> CropParams:
        """Return the parameters from the crop to the frame."""
        sx, sy, tx, ty = self
        return CropParams(1 / sx, 1 / sy, -tx / sx, -ty / sy)


class Alignment(NamedTuple):
    """A patch of an image, and its place in a crop, in whole pixels: left, top, right, bottom."""

    out: tuple[int, int, int, int]
    """Part of the crop that the image covers; four zeros where it covers none."""
    src: tuple[int, int, int, int]
    """Patch of the image that is resized to it."""
    adjusted: CropParams
    """Parameters from the image's pixels to the crop after aligning."""


def crop_params(box: Box, area_factor: float, size: int) -> CropParams:
    """Return the square crop around a box, with context (the crop of SiamFC).

    Args:
        box: the object; both sides more than 0.
        area_factor: 1 is no context; the context grows with the mean side of the box.
        size: side of the crop, in crop pixels.
    """
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    context = (area_factor - 1) * (w + h) * 0.5
    scale = math.sqrt(size * size / ((w + context) * (h + context)))
    half = size * 0.5
    return CropParams(scale, scale, half - scale * 0.5 * (x1 + x2), half - scale * 0.5 * (y1 + y2))


def jittered_crop_params(
    box: Box,
    area_factor: float,
    size: int,
    rng: np.random.Generator,
    *,
    scale_jitter: float,
    translation_jitter: float,
    min_object_size: float,
    max_tries: int = 12,
) -> tuple[CropParams, bool]:
    """Draw a crop around a box with jittered scale and position.

    Each axis is rescaled by ``exp(-scale_jitter * N(0, 1))`` independently, and the crop is
    shifted by ``U(-1, 1)`` per axis times one amplitude common to both:
    ``0.5 * translation_jitter * (w * sx + h * sy)`` crop pixels.  A draw is rejected when less
    than ``min_object_size`` crop pixels of either side of the box stay inside the crop.

    Each try consumes ``standard_normal(2)`` and then ``uniform(-1, 1, 2)`` of ``rng``.

    Returns:
        The parameters of the last try, and whether that one was accepted.
    """
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    centre_x, centre_y = 0.5 * (x1 + x2), 0.5 * (y1 + y2)
    half = size * 0.5
    scale = crop_params(box, area_factor, size).scale_x
    params = CropParams(scale, scale, 0.0, 0.0)
    for _ in range(max_tries):
        sx = scale / math.exp(scale_jitter * rng.standard_normal())
        sy = scale / math.exp(scale_jitter * rng.standard_normal())
        amplitude = 0.5 * translation_jitter * (w * sx + h * sy)
        tx = half - sx * centre_x + amplitude * (2.0 * rng.random() - 1.0)
        ty = half - sy * centre_y + amplitude * (2.0 * rng.random() - 1.0)
        params = CropParams(sx, sy, tx, ty)
        visible_w = min(x2 * sx + tx, size) - max(x1 * sx + tx, 0.0)
        visible_h = min(y2 * sy + ty, size) - max(y1 * sy + ty, 0.0)
        if (
            visible_w > 0
            and visible_h > 0
            and visible_w >= min_object_size
            and visible_h >= min_object_size
        ):
            return params, True
    return params, False


def align(params: CropParams, size: int, image_w: int, image_h: int) -> Alignment:
    """Align the borders of a crop with whole pixels of the image.

    The image's rectangle in the crop is widened to whole crop pixels, and that rectangle is mapped
    back and widened to whole image pixels.

    Args:
        params: nominal crop.
        size: side of the crop.
        image_w, image_h: size of the image.
    """
    out = rasterize(clip_box(params.apply((0.0, 0.0, image_w, image_h)), size, size))
    back = rasterize(params.inverse().apply(out))
    src = (max(back[0], 0), max(back[1], 0), min(back[2], image_w), min(back[3], image_h))
    out_w, out_h = out[2] - out[0], out[3] - out[1]
    src_w, src_h = src[2] - src[0], src[3] - src[1]
    if out_w <= 0 or out_h <= 0 or src_w <= 0 or src_h <= 0:
        return Alignment((0, 0, 0, 0), (0, 0, 0, 0), params)
    sx, sy = round_pair(out_w / src_w, out_h / src_h)
    left, top = round_pair(src[0] * sx, src[1] * sy)
    return Alignment(out, src, CropParams(sx, sy, *round_pair(out[0] - left, out[1] - top)))


_FLOAT32_PAIR = struct.Struct("2f")


def round_pair(first: float, second: float) -> tuple[float, float]:
    """Round two numbers to float32.

    A sum, product or quotient of float32 numbers that is rounded to float32 after float64 has the
    bits of float32 arithmetic, at a fraction of the time of NumPy's scalars.
    """
    rounded: tuple[float, float] = _FLOAT32_PAIR.unpack(_FLOAT32_PAIR.pack(first, second))
    return rounded


def resample(
    image_HWC: np.ndarray,
    params: CropParams,
    size: int,
    fill_rgb: np.ndarray,
    *,
    window: Box | None = None,
    exact: bool = True,
) -> tuple[np.ndarray, CropParams]:
    """Cut a crop whose borders are aligned with whole pixels of the image.

    The patch of the image that :func:`align` gives is resized to its place in the crop (bilinear,
    no antialiasing).  What lies outside of the image is ``fill_rgb``.

    Args:
        image_HWC: uint8 or float32, 0 to 255, 3 channels.
        params: nominal crop, from the frame's pixels.
        size: side of the crop.
        fill_rgb: colour outside of the image, 0 to 255.
        window: the part of the frame that ``image_HWC`` shows, in frame pixels, if it is a stored
            window; it may be scaled.  None means the whole frame, unscaled.
        exact: float32 crop with the weights that torch uses; otherwise a uint8 crop by OpenCV's
            fixed-point resize of a uint8 image, ten times as fast and within 1 of the former.

    Returns:
        The crop (size, size, 3), and the adjusted parameters from the frame's
        pixels to the crop: boxes must be mapped with these.
    """
    image_h, image_w = image_HWC.shape[:2]
    ratio_x = ratio_y = 1.0
    left = top = 0.0
    if window is not None:
        left, top, right, bottom = window
        ratio_x, ratio_y = image_w / (right - left), image_h / (bottom - top)
        params = CropParams(
            params.scale_x / ratio_x,
            params.scale_y / ratio_y,
            params.shift_x + params.scale_x * left,
            params.shift_y + params.scale_y * top,
        )
    crop_HWC = np.empty((size, size, 3), dtype=np.float32 if exact else np.uint8)
    out, src, adjusted = align(params, size, image_w, image_h)
    out_w, out_h = out[2] - out[0], out[3] - out[1]
    if (out_w, out_h) != (size, size):
        _fill(crop_HWC, fill_rgb)
    if out_w > 0:
        patch_HWC = image_HWC[src[1] : src[3], src[0] : src[2]]
        if exact:
            resized_HWC = resize_bilinear(patch_HWC, out_w, out_h)
        else:
            resized_HWC = cv2.resize(patch_HWC, (out_w, out_h), interpolation=cv2.INTER_LINEAR)
        crop_HWC[out[1] : out[3], out[0] : out[2]] = resized_HWC
    if window is not None:
        sx_frame, sy_frame = adjusted.scale_x * ratio_x, adjusted.scale_y * ratio_y
        adjusted = CropParams(
            sx_frame,
            sy_frame,
            adjusted.shift_x - sx_frame * left,
            adjusted.shift_y - sy_frame * top,
        )
    return crop_HWC, adjusted


def _fill(image_HWC: np.ndarray, rgb: np.ndarray) -> None:
    """Paint an image in one colour, row by row (a broadcast over 3 channels is slow)."""
    if image_HWC.dtype == np.uint8:
        rgb = np.rint(rgb)
    height, width = image_HWC.shape[:2]
    row_W3 = np.empty((width, 3), dtype=image_HWC.dtype)
    row_W3[:] = rgb
    image_HWC.reshape(height, width * 3)[:] = row_W3.ravel()


def resize_bilinear(image_HWC: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize to float32 with the arithmetic of ``torch.nn.functional.interpolate``.

    Bilinear, no antialiasing, ``align_corners=False``.  OpenCV rounds the sampling positions
    differently, which shows as 0.01 grey levels on noisy images.
    """
    top_H, bottom_H, weight_H = taps(image_HWC.shape[0], height)
    left_W, right_W, weight_W = taps(image_HWC.shape[1], width)
    rows_HWC = _lerp(
        image_HWC.take(top_H, axis=0), image_HWC.take(bottom_H, axis=0), weight_H[:, None, None]
    )
    return _lerp(
        rows_HWC.take(left_W, axis=1), rows_HWC.take(right_W, axis=1), weight_W[None, :, None]
    )


def taps(num_in: int, num_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, per output pixel of an axis, both source indices and the weight of the second."""
    ratio = float(np.float32(num_in) / np.float32(num_out))
    # Rounded to float32 once, as by torch where its kernel has a fused multiply-add.
    position = np.maximum((ratio * (np.arange(num_out) + 0.5) - 0.5).astype(np.float32), 0)
    first = np.minimum(position.astype(np.int64), num_in - 1)
    weight = np.minimum(position - first.astype(np.float32), np.float32(1))
    return first, np.minimum(first + 1, num_in - 1), weight


def _lerp(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    first = first.astype(np.float32, copy=False)
    step = second.astype(np.float32, copy=False) - first
    step *= weight
    step += first
    return step


def foreground_mask(box_in_crop: Box, size: int, grid: int) -> np.ndarray:
    """Mark the template tokens that the box touches.

    Args:
        box_in_crop: the object in the template crop, in crop pixels (adjusted parameters).
        size: side of the template crop, in pixels.
        grid: side of the token grid.

    Returns:
        int64 (grid, grid): 1 foreground, 0 background.

    Raises:
        ValueError: if the box lies outside of the crop.
    """
    stride = size / grid
    x1, y1, x2, y2 = clip_box(box_in_crop, size, size)
    left, top, right, bottom = rasterize((x1 / stride, y1 / stride, x2 / stride, y2 / stride))
    mask_HW = np.zeros((grid, grid), dtype=np.int64)
    mask_HW[top : min(bottom, grid), left : min(right, grid)] = 1
    if not mask_HW.any():
        raise ValueError(f"Box {box_in_crop} lies outside of the {size}-pixel template crop.")
    return mask_HW
