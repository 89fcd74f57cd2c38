"""Pairs of crops composed of photographs and cut-outs, drawn straight into the crops.

Pair ``number`` of a split is a pure function of (split, number).  It shows a target at two moments.
At each moment the frame's origin is the target's centre and its unit the target's mean side at the
first moment; every layer (background, things behind, target, things in front) is an affine map
from its picture into that frame, and the crop is a scale and shift of the frame.  There is no video
in between: drawing two crops takes about 2 ms where rendering two frames takes 20.
"""

from __future__ import annotations

import math
from typing import Literal

import cv2
import numpy as np

from lorat.config.training import AugmentConfig
from lorat.config.variants import Variant
from lorat.data.pairs.augment_draws import AUGMENT_FIELDS, draw_augmentation
from lorat.data.pairs.batches import Batch
from lorat.data.synthetic.camera import seen_by_a_camera
from lorat.data.synthetic.figures import bent, filled, halved, opaque, padded, recoloured, walker
from lorat.data.synthetic.layers import (
    Moment,
    Thing,
    about_the_centre,
    ellipse,
    frame_to,
    inverted,
    map_points,
    normalised,
    placed,
    render,
    similarity,
    squared,
)
from lorat.data.synthetic.material import Material
from lorat.image.boxes import Box
from lorat.image.crops import CropParams, crop_params, jittered_crop_params

CollageSplit = Literal["train", "val"]
STREAMS: dict[CollageSplit, int] = {"train": 404, "val": 505}
"""First element of every random seed of a split."""
REGION_SHARE = 0.3
"""Share of the pairs whose target is a region of the background itself, unless it is blank."""
LEAST_CONTRAST = 14.0
"""Smallest standard deviation of a region's grey levels."""
KINDS = {"cutout": 0.55, "drawing": 0.10, "silhouette": 0.13, "shape": 0.07, "person": 0.15}
"""What the other targets are: a cut-out photograph, a drawing, a silhouette of either filled with a
texture, a blob or quadrangle of two textures, a walking outline of a person; shares of 1."""
GREY_SHARE = 0.12
_AUGMENT = AugmentConfig(color_jitter=0.2, three_augment=False)
_MIRRORED = 0.1
"""Share of the pairs whose crops are mirrored against each other by the augmentation."""
_TEMPLATE_FLIP, _SEARCH_FLIP = (AUGMENT_FIELDS.index(f"{r}_flip") for r in ("template", "search"))


class Collage:
    """Draws the pairs of a split.

    Args:
        material: what they are made of.
        variant: sizes and area factors of the crops.
        split: stream of random numbers.
    """

    def __init__(self, material: Material, variant: Variant, split: CollageSplit = "train"):
        self.variant = variant
        self._material = material
        self._stream = STREAMS[split]

    def load(self, numbers: np.ndarray) -> Batch:
        """Return pairs as :func:`lorat.data.pairs.sampler.load_pairs` does, without its counts."""
        size = {"template": self.variant.template_size, "search": self.variant.search_size}
        batch = {}
        for role, side in size.items():
            batch[role] = np.empty((len(numbers), side, side, 3), np.uint8)
            batch[f"{role}_box"] = np.empty((len(numbers), 4), np.float32)
        batch["augment"] = np.empty((len(numbers), len(AUGMENT_FIELDS)), np.float32)
        batch["index"] = np.array(numbers, dtype=np.int64)
        for row, number in enumerate(batch["index"].tolist()):
            self._draw(number, batch, row)
        return batch

    def _draw(self, number: int, batch: Batch, row: int) -> None:
        rng = np.random.default_rng([self._stream, number])
        first, second = self._moments(rng)
        variant = self.variant
        given = _unsteady(first.box, rng)
        views = {
            "template": crop_params(given, variant.template_area_factor, variant.template_size),
            "search": self._search_view(second.box, rng),
        }
        boxes = {"template": given, "search": second.box}
        grey = rng.random() < GREY_SHARE
        for role, moment in (("template", first), ("search", second)):
            view, box = views[role], views[role].apply(boxes[role])
            image = render(moment, view, batch[role].shape[1])
            batch[role][row] = seen_by_a_camera(image, box, rng, grey=grey)
            batch[f"{role}_box"][row] = box
        parameters = draw_augmentation(_AUGMENT, rng)
        batch["augment"][row] = parameters
        if rng.random() >= _MIRRORED:
            batch["augment"][row, _SEARCH_FLIP] = parameters[_TEMPLATE_FLIP]

    def _search_view(self, box: Box, rng: np.random.Generator) -> CropParams:
        """Jitter the search crop: half of the shifts over the whole crop, half near its centre."""
        wide = rng.random() < 0.5
        view, _ = jittered_crop_params(
            box,
            self.variant.search_area_factor,
            self.variant.search_size,
            rng,
            scale_jitter=0.25 if wide else 0.15,
            translation_jitter=3.0 if wide else 0.8,
            min_object_size=10.0,
        )
        return view

    def _moments(self, rng: np.random.Generator) -> tuple[Moment, Moment]:
        background = self._photograph(rng)
        height, width = background.shape[:2]
        unit = math.exp(rng.uniform(math.log(20), math.log(min(height, width) / 3.5)))
        change = _change(rng)
        targets: list[Thing | None] = [None, None]
        region = self._region(background, unit, rng) if rng.random() < REGION_SHARE else None
        if region is not None:
            place_px = frame_to(region, unit)
            maps = [place_px, place_px @ squared(inverted(change))]
            outline = ellipse(math.exp(rng.normal(0, 0.35)))
            outlines = [outline, map_points(change, outline)]
        else:
            centre = rng.uniform(0.2, 0.8, 2) * [width, height]
            pictures = self._target(rng)
            turn = rng.normal(0, 0.06)
            place = [normalised(p, turn) for p in pictures]
            place[1] = change @ squared(place[1])
            targets = [Thing(picture=p, matrix=m) for p, m in zip(pictures, place, strict=True)]
            outlines = [t.outline() for t in targets if t is not None]
            way = rng.normal(0, 1, 2) * unit * math.exp(rng.uniform(-2.5, 1.2))
            camera = similarity(rng.normal(0, 0.04), math.exp(rng.normal(0, 0.08)))
            maps = [frame_to(centre, unit), frame_to(centre + way, unit) @ squared(camera)]
        backgrounds = [background, background]
        if targets[0] is not None and rng.random() < 0.06:
            backgrounds[1] = self._photograph(rng)
        others = self._others(targets, rng)
        moments = []
        for t in range(2):
            moments.append(
                Moment(
                    background=backgrounds[t],
                    background_matrix=maps[t],
                    behind=[thing[t] for thing, is_front in others if not is_front],
                    target=targets[t],
                    front=[thing[t] for thing, is_front in others if is_front],
                    box=(*outlines[t].min(axis=0), *outlines[t].max(axis=0)),
                )
            )
        return moments[0], moments[1]

    def _others(
        self, targets: list[Thing | None], rng: np.random.Generator
    ) -> list[tuple[tuple[Thing, Thing], bool]]:
        """Draw other things, at both moments, and whether they are in front of the target."""
        others = []
        # At rest beside a region as beside a thing, or what moves would be the target.
        for _ in range(int(rng.integers(0, 5) * (rng.random() < 0.8))):
            if targets[0] is not None and rng.random() < 0.4:
                picture = targets[int(rng.integers(2))].picture  # type: ignore[union-attr]
                if rng.random() < 0.7:
                    picture = recoloured(picture, rng)
                size = math.exp(rng.normal(0, 0.15))
            else:
                picture = self._any_picture(rng)
                size = math.exp(rng.normal(0, 0.45))
            place = _around(rng, 0.75, 2.6)
            near = _around(rng, 0.75, 2.6) if rng.random() < 0.3 else place + rng.normal(0, 0.3, 2)
            turn, grown = rng.normal(0, 0.1), math.exp(rng.normal(0, 0.08))
            pair = (
                placed(picture, rng.normal(0, 0.1), size, place),
                placed(picture, turn, size * grown, near),
            )
            others.append((pair, bool(rng.random() < 0.5)))
        far = np.array([99.0, 99.0])
        for at_first, at_second, share in ((far, None, 0.22), (None, far, 0.07)):
            if rng.random() < share:
                if rng.random() < 0.35:  # a pole
                    picture = opaque(self._patch(rng, 48))
                    narrow = np.diag([rng.uniform(0.12, 0.5), 9.0, 1.0])
                else:
                    picture = self._any_picture(rng)
                    narrow = np.eye(3)
                spots = [
                    s if s is not None else _around(rng, 0.3, 0.8) for s in (at_first, at_second)
                ]
                size = math.exp(rng.normal(-0.1, 0.4))
                one, other = (
                    Thing(picture=picture, matrix=thing.matrix @ about_the_centre(picture, narrow))
                    for thing in (placed(picture, rng.normal(0, 0.15), size, s) for s in spots)
                )
                others.append(((one, other), True))
        return others

    def _target(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw a target's pictures at both moments."""
        kind = rng.choice(list(KINDS), p=list(KINDS.values()))
        if kind == "person":
            return self._person(rng)
        if kind == "cutout":
            picture = _pick(self._material.cutouts, rng)
        elif kind == "drawing":
            picture = _pick(self._material.drawings, rng)
        elif kind == "silhouette":
            piles = (self._material.cutouts, self._material.drawings)
            shape = _pick(piles[int(rng.integers(2))], rng)[..., 3]
            picture = filled(halved(shape), self._patch(rng, 100))
        else:
            picture = self._shape(rng)
        picture = halved(picture)
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        if rng.random() < 0.25:
            picture = recoloured(picture, rng)
        picture = padded(picture)
        second = bent(picture, rng) if rng.random() < 0.4 else picture
        return picture, second

    def _shape(self, rng: np.random.Generator) -> np.ndarray:
        """Make a smooth blob or a quadrangle of two textures."""
        side = 80
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        if rng.random() < 0.5:
            radius = 0.75 + sum(
                rng.normal(0, 0.13 / k) * np.cos(k * angles + rng.uniform(0, 6.3))
                for k in (2, 3, 4)
            )
        else:
            angles = np.arange(4) * np.pi / 2 + np.pi / 4 + rng.normal(0, 0.15, 4)
            radius = 1.1 + rng.normal(0, 0.1, 4)
        aspect = math.exp(rng.normal(0, 0.3))
        points = np.stack([radius * np.cos(angles) * aspect, radius * np.sin(angles)], axis=1)
        points = points / np.abs(points).max() * 0.48 * side + side / 2
        mask = np.zeros((side, side), np.uint8)
        cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
        texture = self._patch(rng, side)
        if rng.random() < 0.6:
            cut = int(rng.integers(20, 60))
            texture[cut:] = self._patch(rng, side)[cut:]
        x, y, width, height = cv2.boundingRect(mask)
        return filled(mask, texture)[y : y + height, x : x + width]

    def _person(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Make an outline that walks: head, trunk and limbs of three textures, in two poses."""
        top, legs = self._patch(rng, 120), self._patch(rng, 120)
        skin = np.array([224, 172, 138]) * rng.uniform(0.35, 1.1)
        hair = np.array([60, 45, 35]) * rng.uniform(0.2, 3)
        build, swing = rng.uniform(0.8, 1.3), rng.uniform(0.1, 0.55)
        crouch = rng.uniform(0.75, 1.0)
        phase = rng.uniform(0, 2 * np.pi)
        phases = (phase, phase + rng.normal(0, 1.2))
        facing = rng.choice([-1, 1])
        pictures = [
            walker(top, legs, skin, hair, build, crouch, facing * swing * math.sin(p))
            for p in phases
        ]
        return halved(pictures[0]), halved(pictures[1])

    def _any_picture(self, rng: np.random.Generator) -> np.ndarray:
        draw = rng.random()
        if draw < 0.15:
            return self._person(rng)[0]
        if draw < 0.35:
            shape = _pick(self._material.drawings, rng)[..., 3]
            return filled(halved(shape), self._patch(rng, 100))
        piles = (self._material.cutouts, self._material.drawings)
        return halved(_pick(piles[draw > 0.85], rng))

    def _photograph(self, rng: np.random.Generator) -> np.ndarray:
        return _pick(self._material.photographs, rng)

    def _patch(self, rng: np.random.Generator, side: int) -> np.ndarray:
        """Cut a square out of a photograph: RGB uint8 (side, side, 3)."""
        photograph = self._photograph(rng)
        height, width = photograph.shape[:2]
        cut = int(min(height, width) * math.exp(rng.uniform(math.log(0.2), math.log(0.9))))
        y, x = int(rng.integers(height - cut + 1)), int(rng.integers(width - cut + 1))
        patch = photograph[y : y + cut, x : x + cut]
        return cv2.resize(patch, (side, side), interpolation=cv2.INTER_AREA)

    def _region(
        self, photograph: np.ndarray, unit: float, rng: np.random.Generator
    ) -> np.ndarray | None:
        """Choose a region's centre in the photograph, none if it is blank: sky teaches nothing."""
        height, width = photograph.shape[:2]
        best, best_contrast = None, LEAST_CONTRAST
        for _ in range(4):
            centre = rng.uniform(0.15, 0.85, 2) * [width, height]
            x, y = (centre - unit / 2).astype(int)
            patch = photograph[max(y, 0) : y + int(unit), max(x, 0) : x + int(unit), 1]
            contrast = float(patch.std())
            if contrast > best_contrast:
                best, best_contrast = centre, contrast
            if contrast > 35:
                break
        return best


def _change(rng: np.random.Generator) -> np.ndarray:
    """Draw how a target changes in the frame: turned, grown, squeezed on one axis (2, 3)."""
    wide = rng.random() < 0.15
    turn = rng.uniform(-0.8, 0.8) if wide else rng.normal(0, 0.09)
    growth = math.exp(rng.normal(0, 0.15))
    squeeze = np.exp([rng.normal(0, 0.1), rng.normal(0, 0.05)])
    if rng.random() < 0.12:
        squeeze[int(rng.integers(2))] *= rng.uniform(0.5, 0.9)
    if rng.random() < 0.03:
        squeeze[0] *= -1
    shear = rng.normal(0, 0.05)
    matrix = similarity(turn, growth)
    matrix[:, :2] = matrix[:, :2] @ np.array([[1, shear], [0, 1]]) @ np.diag(squeeze)
    return matrix


def _unsteady(box: Box, rng: np.random.Generator) -> Box:
    """Draw a box as a hand does: each edge off by a few percent."""
    x1, y1, x2, y2 = box
    off = np.clip(rng.normal(0, 0.025, 4), -0.08, 0.08).tolist()
    width, height = x2 - x1, y2 - y1
    return (
        x1 + off[0] * width,
        y1 + off[1] * height,
        x2 + off[2] * width,
        y2 + off[3] * height,
    )


def _around(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Draw a place at some distance of the target's centre."""
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(low, high)
    return np.array([distance * math.cos(angle), distance * math.sin(angle)])


def _pick(pile: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    return pile[int(rng.integers(len(pile)))]
