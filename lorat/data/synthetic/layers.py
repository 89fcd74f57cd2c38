"""The layers of a collage: things in a frame, and how they are drawn into a crop.

Matrices are affine, float64 (2, 3) unless they are called square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from lorat.image.boxes import Box
from lorat.image.crops import CropParams

MOST_HIDDEN = 0.6
"""Largest share of the target that things in front may cover."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One picture of a thing and where it lies in the frame."""

    picture: np.ndarray
    """RGBA uint8, colours multiplied by the alpha."""
    matrix: np.ndarray
    """float64 (2, 3), from the picture's pixels to the frame."""

    def outline(self) -> np.ndarray:
        """Return the convex outline (n, 2) of what is opaque, in the frame."""
        mask = (self.picture[..., 3] > 127).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        if not contours:
            height, width = mask.shape
            contours = [np.array([[[0, 0]], [[width, 0]], [[width, height]], [[0, height]]])]
        hull = cv2.convexHull(np.concatenate(contours))[:, 0].astype(np.float64) + 0.5
        return map_points(self.matrix, hull)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is seen at one of the two moments, before it is cropped."""

    background: np.ndarray
    """RGB uint8 photograph."""
    background_matrix: np.ndarray
    """float64 (2, 3), from the frame to the photograph's pixels."""
    behind: list[Thing]
    target: Thing | None
    """None if the target is a region of the background."""
    front: list[Thing]
    box: Box
    """The target's box in the frame."""


def render(moment: Moment, view: CropParams, side: int) -> np.ndarray:
    """Draw the layers into a crop: RGB uint8 (side, side, 3)."""
    to_frame = matrix_of(view.inverse())
    matrix = moment.background_matrix @ squared(to_frame)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(
        moment.background, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REFLECT
    )
    to_crop = squared(matrix_of(view))
    for thing in moment.behind:
        _paste(image, thing, to_crop)
    free = np.zeros((side, side), np.uint8)
    if moment.target is not None:
        _paste(image, moment.target, to_crop, free)
    else:
        points = map_points(to_crop[:2], ellipse_in(moment.box))
        cv2.fillConvexPoly(free, np.round(points).astype(np.int32), 255)
    most = MOST_HIDDEN * float(free.sum())
    hidden = 0.0
    for thing in moment.front:
        hidden += _paste(image, thing, to_crop, hides=free, at_most=most - hidden)
    return image


def _paste(
    image: np.ndarray,
    thing: Thing,
    to_crop: np.ndarray,
    claim: np.ndarray | None = None,
    hides: np.ndarray | None = None,
    at_most: float = math.inf,
) -> float:
    """Draw a thing unless it hides too much.

    Args:
        image: changed in place.
        thing: to draw.
        to_crop: (3, 3), from the frame.
        claim: receives the thing's alpha.
        hides: alpha of what should stay seen.
        at_most: largest sum of it that may be covered.

    Returns:
        How much of ``hides`` it covers.
    """
    side = image.shape[0]
    picture, matrix = thing.picture, (to_crop @ squared(thing.matrix))[:2]
    scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    while scale < 0.55 and min(picture.shape[:2]) > 8:
        height, width = picture.shape[:2]
        picture = cv2.resize(picture, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        ratio = np.diag([width / (width // 2), height / (height // 2)])
        matrix = np.concatenate([matrix[:, :2] @ ratio, matrix[:, 2:]], axis=1)
        scale *= 2
    height, width = picture.shape[:2]
    corners = map_points(
        matrix, np.array([[0, 0], [width, 0], [width, height], [0, height]], float)
    )
    x1, y1 = (max(int(v), 0) for v in np.floor(corners.min(axis=0)))
    x2, y2 = (min(int(v), side) for v in np.ceil(corners.max(axis=0)))
    if x1 >= x2 or y1 >= y2:
        return 0.0
    matrix = matrix - [[0, 0, x1], [0, 0, y1]]
    matrix[:, 2] += 0.5 * (matrix[:, 0] + matrix[:, 1]) - 0.5  # pixels' centres are at halves
    layer = cv2.warpAffine(picture, matrix, (x2 - x1, y2 - y1), flags=cv2.INTER_LINEAR)
    alpha = layer[..., 3]
    covered = 0.0
    if hides is not None:
        covered = float((hides[y1:y2, x1:x2] * (alpha > 127)).sum())
        if covered > at_most:
            return 0.0
    region = image[y1:y2, x1:x2]
    left = (255 - alpha).astype(np.uint16)[..., None]
    region[:] = ((region * left + 127) // 255).astype(np.uint8) + layer[..., :3]
    if claim is not None:
        claim[y1:y2, x1:x2] = alpha
    return covered


def placed(picture: np.ndarray, turn: float, size: float, place: np.ndarray) -> Thing:
    matrix = similarity(turn, size) @ squared(normalised(picture, 0.0))
    matrix[:, 2] += place
    return Thing(picture=picture, matrix=matrix)


def about_the_centre(picture: np.ndarray, stretch: np.ndarray) -> np.ndarray:
    """Return the stretch (3, 3) about a picture's centre."""
    height, width = picture.shape[:2]
    centre = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1.0]])
    return centre @ stretch @ np.linalg.inv(centre)


def normalised(picture: np.ndarray, turn: float) -> np.ndarray:
    """Return the map (2, 3) of a picture to mean side 1 around the origin, turned."""
    height, width = picture.shape[:2]
    matrix = similarity(turn, 1 / math.sqrt(width * height))
    matrix[:, 2] = -matrix[:, :2] @ [width / 2, height / 2]
    return matrix


def frame_to(centre: np.ndarray, unit: float) -> np.ndarray:
    return np.array([[unit, 0, centre[0]], [0, unit, centre[1]]])


def similarity(turn: float, scale: float) -> np.ndarray:
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0]])


def matrix_of(params: CropParams) -> np.ndarray:
    sx, sy, tx, ty = params
    return np.array([[sx, 0, tx], [0, sy, ty]])


def squared(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix, [[0.0, 0.0, 1.0]]])


def inverted(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.inv(squared(matrix))[:2]


def map_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


def ellipse(aspect: float) -> np.ndarray:
    """Return an outline of mean side 1: a turned rectangle's corners would be too far out."""
    return ellipse_in(
        (-0.5 * aspect**0.5, -0.5 / aspect**0.5, 0.5 * aspect**0.5, 0.5 / aspect**0.5)
    )


def ellipse_in(box: Box) -> np.ndarray:
    angles = np.arange(24) * (2 * np.pi / 24)
    x1, y1, x2, y2 = box
    return np.stack(
        [
            (x1 + x2) / 2 + (x2 - x1) / 2 * np.cos(angles),
            (y1 + y2) / 2 + (y2 - y1) / 2 * np.sin(angles),
        ],
        axis=1,
    )
