"""Pictures of things: RGBA uint8, the colours multiplied by the alpha; made, filled and bent."""

from __future__ import annotations

import cv2
import numpy as np


def walker(
    top: np.ndarray,
    legs: np.ndarray,
    skin: np.ndarray,
    hair: np.ndarray,
    build: float,
    crouch: float,
    swing: float,
) -> np.ndarray:
    """Draw a person of 120 pixels: RGBA, cut to what is opaque."""
    side = 120
    colour = np.zeros((side, side, 3), np.uint8)
    mask = np.zeros((side, side), np.uint8)

    def fill(texture: np.ndarray, part: np.ndarray) -> None:
        cv2.copyTo(texture, part, colour)
        cv2.max(mask, part, mask)

    def limb(texture: np.ndarray, a: tuple[int, int], b: tuple[int, int], width: int) -> None:
        fill(texture, cv2.line(np.zeros_like(mask), a, b, 255, width))

    def cap(tone: np.ndarray, axes: tuple[int, int], start: int) -> None:
        plain = np.full_like(colour, np.clip(tone, 0, 255).astype(np.uint8))
        fill(plain, cv2.ellipse(np.zeros_like(mask), head, axes, 0, start, 360, 255, -1))

    hip, shoulder, foot = 62, 62 - 34 * crouch, 62 + 50 * crouch
    arm, leg = int(9 * build), int(13 * build)
    for way in (-1, 1):
        knee = (round(60 + way * (4 + 18 * swing)), round((hip + foot) / 2))
        end = (round(60 + way * (4 + 40 * swing)), round(foot))
        joint = (60 + way * 4, hip)
        limb(legs, joint, knee, leg)
        limb(legs, knee, end, leg - 2)
        hand = (round(60 - way * (8 + 36 * swing)), round(shoulder + 28))
        start = (60 - way * round(11 * build), round(shoulder + 4))
        limb(top, start, hand, arm)
    half = 14 * build
    trunk = [(60 - half, shoulder), (60 + half, shoulder), (60 + 0.8 * half, hip + 6),
             (60 - 0.8 * half, hip + 6)]  # fmt: skip
    fill(top, cv2.fillPoly(np.zeros_like(mask), [np.array(trunk, np.int32)], 255))
    head = (60, round(shoulder - 9))
    cap(skin, (7, 9), 0)
    cap(hair, (8, 10), 180)
    x, y, width, height = cv2.boundingRect(mask)
    return filled(cv2.GaussianBlur(mask, (3, 3), 0), colour)[y : y + height, x : x + width]


def bent(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bend a picture by a smooth field."""
    height, width = picture.shape[:2]
    field = rng.normal(0, 1, (2, 4, 4)).astype(np.float32)
    strength = rng.uniform(0.015, 0.06)
    maps = []
    for axis, length in enumerate((width, height)):
        shift = cv2.resize(field[axis], (width, height), interpolation=cv2.INTER_CUBIC)
        at = np.arange(length, dtype=np.float32)
        maps.append((at[None, :] if axis == 0 else at[:, None]) + shift * (strength * length))
    return cv2.remap(picture, maps[0], maps[1], cv2.INTER_LINEAR)


def recoloured(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give a picture other colours, the alpha as it is."""
    changed = picture.copy()
    order = rng.permutation(3)
    gain = np.exp(rng.normal(0, 0.25, 3)).astype(np.float32)
    colours = picture[..., :3][..., order] * gain
    changed[..., :3] = np.minimum(colours, picture[..., 3:])
    return changed


def filled(mask: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Return a mask filled with a texture, as RGBA with multiplied colours."""
    height, width = mask.shape
    if texture.shape[:2] != mask.shape:
        texture = cv2.resize(texture, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.dstack([(texture * mask[..., None].astype(np.uint16) // 255).astype(np.uint8), mask])


def opaque(texture: np.ndarray) -> np.ndarray:
    return np.dstack([texture, np.full(texture.shape[:2], 255, np.uint8)])


def halved(picture: np.ndarray) -> np.ndarray:
    """Halve a large picture: the crops show about 50 of its pixels."""
    height, width = picture.shape[:2]
    if max(height, width) <= 110:
        return picture
    return cv2.resize(picture, (width // 2, height // 2), interpolation=cv2.INTER_AREA)


def padded(picture: np.ndarray) -> np.ndarray:
    """Add a transparent margin, into which a bend may push."""
    margin = max(picture.shape[:2]) // 10
    return cv2.copyMakeBorder(picture, margin, margin, margin, margin, cv2.BORDER_CONSTANT)
