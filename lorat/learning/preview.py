"""Preview: sampled pairs as the network gets them, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from lorat.config.training import AugmentConfig, SamplingConfig
from lorat.config.variants import Variant
from lorat.data.pairs.batches import Batch
from lorat.data.pairs.sampler import PairSampler, load_pairs
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError, named
from lorat.files.outputs import check_file
from lorat.files.scratch import whole_file

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_MARGIN = 6
_HEADER = 22
_BOX_COLOUR = (255, 60, 30)
_TITLES = ("template", "search", "template, augmented, mask", "search, augmented")


def draw_pairs(index: FrameIndex, variant: Variant, *, num_pairs: int, seed: int) -> np.ndarray:
    """Draw pairs of a dataset: both crops as cut, then as augmented, with box and mask.

    Returns:
        RGB uint8; a row per pair, with its sequence and frames.
    """
    sampler = PairSampler([index], [1.0], variant, SamplingConfig(), AugmentConfig(), seed)
    batch = load_pairs(sampler, [ImageReader(index)], list(range(num_pairs)))
    captions = []
    for i in range(num_pairs):
        spec = sampler.sample(i)
        numbers = index.frame_number[[spec.template_row, spec.search_row]]
        captions.append(f"{index.sequence(spec.track)}  frames {numbers[0]} and {numbers[1]}")
    return draw_batch(batch, variant, captions)


def draw_batch(batch: Batch, variant: Variant, captions: Sequence[str]) -> np.ndarray:
    """Draw the pairs of a batch as :func:`draw_pairs` does, each under its caption."""
    import torch

    from lorat.learning.augment import augment, foreground_mask

    names = ("template", "search", "template_box", "search_box", "augment")
    tensors = {name: torch.from_numpy(batch[name]) for name in names}
    template, search, template_box, search_box = augment(tensors)
    masks = foreground_mask(template_box, variant).numpy()
    rows = []
    for i, caption in enumerate(captions):
        masked = _tint(_restore(template[i].numpy()), masks[i])
        pictures = [
            _with_box(batch["template"][i], batch["template_box"][i]),
            _with_box(batch["search"][i], batch["search_box"][i]),
            _with_box(masked, template_box[i].numpy()),
            _with_box(_restore(search[i].numpy()), search_box[i].numpy()),
        ]
        rows.append(_join(pictures, caption, variant.search_size))
    heading = _join([], "   |   ".join(_TITLES), 0, rows[0].shape[1])
    return np.concatenate([heading, *rows])


def check_picture(file: Path) -> None:
    """Refuse a place for a picture before the work; nothing is made.

    Raises:
        UserError: for another ending, and where no file can be written.
    """
    if file.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"Cannot write {named(file)}: give a name that ends in .png or .jpg.")
    check_file(file)


def write_picture(picture_HWC: np.ndarray, file: Path) -> None:
    """Write an RGB uint8 picture to a .png or .jpg file; missing folders are made.

    Raises:
        OSError: if it cannot be written, such as on a full disk.
    """
    _, encoded = cv2.imencode(file.suffix, cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2BGR))
    with whole_file(file) as part:
        part.write_bytes(encoded.tobytes())


def _restore(image_CHW: np.ndarray) -> np.ndarray:
    """Undo the normalisation of a network input."""
    image_HWC = image_CHW.transpose(1, 2, 0) * _STD + _MEAN
    return np.clip(image_HWC * 255, 0, 255).astype(np.uint8)


def _tint(image_HWC: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tint the foreground tokens of a template."""
    size = image_HWC.shape[1], image_HWC.shape[0]
    cells = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)[..., None]
    tinted = image_HWC * 0.6 + np.array([40.0, 220.0, 60.0]) * 0.4
    return np.where(cells == 1, tinted, image_HWC).astype(np.uint8)


def _with_box(image_HWC: np.ndarray, box: np.ndarray) -> np.ndarray:
    drawn = np.ascontiguousarray(image_HWC)
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    cv2.rectangle(drawn, (x1, y1), (x2 - 1, y2 - 1), _BOX_COLOUR, 1)
    return drawn


def _join(
    pictures: list[np.ndarray], caption: str, height: int, width: int | None = None
) -> np.ndarray:
    """Lay pictures side by side under a caption."""
    if width is None:
        width = sum(p.shape[1] + _MARGIN for p in pictures) + _MARGIN
    row = np.full((height + _HEADER + _MARGIN, width, 3), 255, np.uint8)
    origin = (_MARGIN, _HEADER - 7)
    cv2.putText(row, caption, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    left = _MARGIN
    for picture in pictures:
        picture_height, picture_width = picture.shape[:2]
        row[_HEADER : _HEADER + picture_height, left : left + picture_width] = picture
        left += picture_width + _MARGIN
    return row
