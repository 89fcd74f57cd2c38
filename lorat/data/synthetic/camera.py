"""What a camera and its files do to a crop: light, blur, noise, low resolution, blocks, borders."""

from __future__ import annotations

import math

import cv2
import numpy as np

from lorat.image.boxes import Box


def seen_by_a_camera(
    image: np.ndarray, box: Box, rng: np.random.Generator, *, grey: bool
) -> np.ndarray:
    """Change light, sharpness, noise and blocks of a crop, and cut off what no frame shows."""
    u = rng.random(10).tolist()
    side = image.shape[0]
    if u[0] < 0.6:
        gamma, gain = math.exp(rng.normal(0, 0.2)), math.exp(rng.normal(0, 0.12))
        level = (np.arange(256) / 255.0) ** gamma * 255 * gain + rng.normal(0, 6)
        levels = level[:, None] * np.exp(rng.normal(0, 0.05, 3))
        image = cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8)[None])
    if u[1] < 0.2:
        length = int(rng.integers(3, 10))
        kernel = np.zeros((length, length), np.float32)
        angle = rng.uniform(0, np.pi)
        half = (length - 1) / 2
        dx, dy = half * math.cos(angle), half * math.sin(angle)
        ends = [(round(half + s * dx), round(half + s * dy)) for s in (-1, 1)]
        cv2.line(kernel, ends[0], ends[1], 1.0)
        image = cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)
    elif u[1] < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 2.2))
    if u[2] < 0.35:
        small = max(int(side * math.exp(rng.uniform(math.log(0.3), math.log(0.9)))), 8)
        image = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
    if u[3] < 0.3:
        shape = image.shape if u[4] < 0.5 else (*image.shape[:2], 1)
        noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(rng.uniform(2, 14))
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if u[5] < 0.3:
        options = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(15, 80))]
        image = np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, options)[1], cv2.IMREAD_COLOR))
    if image.shape[0] != side:
        image = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
    if grey:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if u[6] < 0.15:
        image = _beside_the_border(image, box, int(u[7] * 4), u[8])
    return image


def _beside_the_border(image: np.ndarray, box: Box, edge: int, share: float) -> np.ndarray:
    """Fill what lies beyond an edge of the frame, not of the target, as a crop there has it."""
    side = image.shape[0]
    low, high = (max(box[0], 0.0), max(box[1], 0.0)), (box[2], box[3])
    axis = edge % 2
    filled = image.copy()
    fill = np.array(cv2.mean(image)[:3]).round().astype(np.uint8)
    if edge < 2:
        stop = int(low[axis] * share)
        part = filled[:, :stop] if axis == 0 else filled[:stop]
    else:
        start = math.ceil(high[axis] + (side - high[axis]) * share)
        part = filled[:, start:] if axis == 0 else filled[start:]
    part[:] = fill
    return filled
