"""The augmentation parameters of one pair: their layout and how they are drawn; no torch."""

from __future__ import annotations

import itertools

import numpy as np

from lorat.config.training import AugmentConfig

AUGMENT_FIELDS = (
    "template_flip",
    "search_flip",
    "template_order",
    "template_brightness",
    "template_contrast",
    "template_saturation",
    "search_order",
    "search_brightness",
    "search_contrast",
    "search_saturation",
    "choice",
    "blur_radius",
)
"""Columns of the ``augment`` array.

Flips are 0 or 1.  Orders index :data:`JITTER_ORDERS`; the three factors multiply, 1 is none.
Choice is -1 nothing, 0 grayscale, 1 solarize, 2 Gaussian blur with that radius in pixels, the
same for both crops.
"""

JITTER_ORDERS = tuple(itertools.permutations(range(3)))
"""Orders of (0 brightness, 1 contrast, 2 saturation)."""

BLUR_RADIUS = (0.1, 2.0)
"""Range of the Gaussian blur's radius, in crop pixels."""


def draw_augmentation(config: AugmentConfig, rng: np.random.Generator) -> tuple[float, ...]:
    """Draw the values of :data:`AUGMENT_FIELDS` for one pair; consumes 12 uniform numbers."""
    u = rng.random(12).tolist()
    low, width = 1.0 - config.resolved_color_jitter, 2.0 * config.resolved_color_jitter
    num_orders = len(JITTER_ORDERS)
    return (
        float(u[0] < config.flip),
        float(u[1] < config.flip),
        float(int(u[2] * num_orders)),
        low + width * u[3],
        low + width * u[4],
        low + width * u[5],
        float(int(u[6] * num_orders)),
        low + width * u[7],
        low + width * u[8],
        low + width * u[9],
        float(int(u[10] * 3)) if config.resolved_three_augment else -1.0,
        BLUR_RADIUS[0] + (BLUR_RADIUS[1] - BLUR_RADIUS[0]) * u[11],
    )
