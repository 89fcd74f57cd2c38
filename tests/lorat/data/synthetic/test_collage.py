"""Collages: pair n is a function of (split, n), and what is drawn is what was planned."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lorat.config.variants import get_variant
from lorat.data.pairs.augment_draws import AUGMENT_FIELDS
from lorat.data.synthetic import collage
from lorat.data.synthetic.collage import Collage
from lorat.data.synthetic.figures import filled, opaque
from lorat.data.synthetic.layers import Moment, placed, render
from lorat.data.synthetic.material import Material
from lorat.image.crops import crop_params

VARIANT = get_variant("T-168")


def _textured(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    coarse = rng.integers(0, 255, (height // 12, width // 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _cut_out(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    picture = np.dstack([_textured(rng, height, width), np.zeros((height, width), np.uint8)])
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, (width // 2, height // 2), (width // 2, height // 2), 0, 0, 360, 255, -1)
    return filled(mask, picture[..., :3])


@pytest.fixture(scope="module")
def material() -> Material:
    rng = np.random.default_rng(5)
    return Material(
        photographs=[_textured(rng, 300, 420) for _ in range(8)],
        cutouts=[_cut_out(rng, 60 + 20 * n, 100) for n in range(6)],
        drawings=[_cut_out(rng, 120, 60 + 10 * n) for n in range(6)],
    )


@pytest.fixture(scope="module")
def pairs(material: Material) -> dict[str, np.ndarray]:
    return Collage(material, VARIANT).load(np.arange(160))


def test_a_pair_is_a_function_of_split_and_number(
    material: Material, pairs: dict[str, np.ndarray]
) -> None:
    alone = Collage(material, VARIANT).load(np.array([17]))
    for name, values in alone.items():
        np.testing.assert_array_equal(values[0], pairs[name][17], err_msg=name)
    other = Collage(material, VARIANT, "val").load(np.array([17]))
    assert not np.array_equal(other["search"], alone["search"])
    assert len(set(collage.STREAMS.values())) == len(collage.STREAMS)


def test_the_boxes_are_in_the_crops_and_of_all_sizes(pairs: dict[str, np.ndarray]) -> None:
    for role, size in (("template", VARIANT.template_size), ("search", VARIANT.search_size)):
        assert pairs[role].shape == (160, size, size, 3)
        box = pairs[f"{role}_box"].clip(0, size)
        assert ((box[:, 2:] - box[:, :2]).min(axis=1) > 4).all()
    box = pairs["search_box"]
    centre = (box[:, :2] + box[:, 2:]) / 2 / VARIANT.search_size
    distance = np.abs(centre - 0.5).max(axis=1)
    assert 0.3 < (distance < 0.15).mean() < 0.8  # half of the shifts are small
    assert (distance > 0.3).mean() > 0.1
    template = pairs["template_box"]
    assert np.abs((template[:, :2] + template[:, 2:]) / 2 - VARIANT.template_size / 2).max() < 0.01
    sides = np.sqrt((box[:, 2:] - box[:, :2]).prod(axis=1)) / VARIANT.search_size
    assert np.percentile(sides, 5) < 0.2 < np.percentile(sides, 95)


def test_grey_and_mirrored_pairs_have_their_shares(pairs: dict[str, np.ndarray]) -> None:
    search = pairs["search"].astype(int)
    grey = (np.ptp(search, axis=-1) == 0).mean(axis=(1, 2)) > 0.5
    assert 0.04 < grey.mean() < 0.22
    flips = [AUGMENT_FIELDS.index(f"{role}_flip") for role in ("template", "search")]
    mirrored = pairs["augment"][:, flips[0]] != pairs["augment"][:, flips[1]]
    assert mirrored.mean() < 0.15


def test_the_target_is_where_its_box_is(material: Material) -> None:
    rng = np.random.default_rng(3)
    for picture in material.cutouts:
        white = np.dstack([picture[..., 3]] * 4)
        thing = placed(white, rng.normal(0, 0.4), 1.2, rng.uniform(-0.2, 0.2, 2))
        outline = thing.outline()
        box = (*outline.min(axis=0), *outline.max(axis=0))
        moment = Moment(
            background=np.zeros((50, 50, 3), np.uint8),
            background_matrix=np.eye(2, 3),
            behind=[],
            target=thing,
            front=[],
            box=box,
        )
        view = crop_params(box, 4.0, 168)
        image = render(moment, view, 168)
        x, y, width, height = cv2.boundingRect((image[..., 0] > 127).astype(np.uint8))
        np.testing.assert_allclose([x, y, x + width, y + height], view.apply(box), atol=1.6)


def test_things_in_front_never_hide_most_of_the_target(material: Material) -> None:
    target = placed(material.cutouts[0], 0.0, 1.0, np.zeros(2))
    wall = opaque(np.full((40, 40, 3), 255, np.uint8))
    outline = target.outline()
    box = (*outline.min(axis=0), *outline.max(axis=0))
    for shift, is_drawn in ((0.0, False), (0.9, True)):
        moment = Moment(
            background=np.zeros((50, 50, 3), np.uint8),
            background_matrix=np.eye(2, 3),
            behind=[],
            target=target,
            front=[placed(wall, 0.0, 1.3, np.array([shift, 0.0]))],
            box=box,
        )
        image = render(moment, crop_params(box, 4.0, 168), 168)
        assert bool((image == 255).all(axis=-1).sum() > 500) is is_drawn


def test_a_region_of_blank_sky_is_no_target(material: Material) -> None:
    draw = Collage(material, VARIANT)._region
    rng = np.random.default_rng(0)
    assert draw(np.full((300, 300, 3), 180, np.uint8), 40.0, rng) is None
    assert draw(material.photographs[0], 40.0, rng) is not None
