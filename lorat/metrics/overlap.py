"""Per-frame overlap and centre errors of boxes given as left, top, width, height (n, 4)."""

from __future__ import annotations

import numpy as np


def iou(first: np.ndarray, second: np.ndarray, inclusive: bool = False) -> np.ndarray:
    """Return intersection over union (n,); NaN where a box is NaN or the union is empty.

    Args:
        inclusive: compute by way of the last pixel, ``x + w - 1``.  It is the same number but for
            its rounding, which decides when an overlap lies on a threshold.
    """
    pixel = 1.0 if inclusive else 0.0
    top_left = np.maximum(first[:, :2], second[:, :2])
    bottom_right = np.minimum(
        first[:, :2] + first[:, 2:] - pixel, second[:, :2] + second[:, 2:] - pixel
    )
    inter = np.clip(bottom_right - top_left + pixel, 0, None).prod(axis=1)
    union = first[:, 2:].prod(axis=1) + second[:, 2:].prod(axis=1) - inter
    with np.errstate(divide="ignore", invalid="ignore"):
        return inter / union


def center_error(truth: np.ndarray, predicted: np.ndarray, shift: float = 1.0) -> np.ndarray:
    """Return the distance of the centres, in pixels.

    Args:
        shift: the centre is ``xy + (wh - shift) / 2``; 1 for boxes of whole pixels.
    """
    difference = _centers(truth, shift) - _centers(predicted, shift)
    return np.sqrt(np.square(difference).sum(axis=1))


def normalized_center_error(
    truth: np.ndarray, predicted: np.ndarray, shift: float = 1.0
) -> np.ndarray:
    """Return the distance of the centres after dividing both by the true width and height."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # Divided before the subtraction, as the toolkits do: errors on a threshold are common.
        difference = (
            _centers(truth, shift) / truth[:, 2:] - _centers(predicted, shift) / truth[:, 2:]
        )
    return np.sqrt(np.square(difference).sum(axis=1))


def _centers(boxes: np.ndarray, shift: float) -> np.ndarray:
    return boxes[:, :2] + 0.5 * (boxes[:, 2:] - shift)
