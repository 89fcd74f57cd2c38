"""Which files of a folder are the frames of a sequence, and in which order.

One rule for tracking and for ingest.  Images are what has the suffix of one in any case; hidden
files (such as the ``._1.jpg`` that macOS leaves beside every file) and folders are none.  A link
that leads nowhere holds its place, as any image that cannot be read.

Among images, the frames are those of one name: with the same text before the first number, and the
same text around their numbers where several images have equal ones (``1.jpg`` and ``1_mask.png``).
A folder without any number in its names is taken whole.  Frames are ordered by their numbers, not
by text, so zeros before a number do not matter.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True, kw_only=True)
class FrameFiles:
    """Images of a folder, told apart."""

    frames: tuple[str, ...]
    """Paths in order."""
    others: tuple[str, ...]
    """Paths of images of other names, such as a cover picture."""


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sorting key by which 2.jpg comes before 10.jpg, in capitals or not."""
    parts = re.split(r"(\d+)", name.lower())
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]


def list_images(folder: Path) -> list[str]:
    """List the paths of the images in a folder, by their numbers; none if it is missing.

    Raises:
        OSError: if the folder may not be read.
    """
    if not folder.is_dir():
        return []
    with os.scandir(folder) as items:
        found = [item.path for item in items if is_image_name(item.name) and not item.is_dir()]
    return sorted(found, key=lambda path: natural_key(os.path.basename(path)))


def is_image_name(name: str) -> bool:
    """Tell whether a file of this name counts as an image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def tell_frames(images: Sequence[str]) -> FrameFiles | None:
    """Tell the frames of a sequence from other images of its folder.

    Args:
        images: paths, as :func:`list_images` gives them.

    Returns:
        Frames in the order given, or none if nothing tells which images are the frames: no name is
        that of more than half of them, or two have the same numbers.
    """
    begins = [_text_before_number(path) for path in images]
    numbered = [path for path, text in zip(images, begins, strict=True) if text is not None]
    if not numbered:
        return FrameFiles(frames=tuple(images), others=())
    frames = _most(images, begins)
    if frames is not None and len({_numbers(path) for path in frames}) < len(frames):
        frames = _most(frames, [_pattern(path) for path in frames])
        if frames is not None and len({_numbers(path) for path in frames}) < len(frames):
            frames = None
    if frames is None:
        return None
    taken = set(frames)
    return FrameFiles(frames=tuple(frames), others=tuple(p for p in images if p not in taken))


def missing_numbers(frames: Sequence[str]) -> tuple[int, int]:
    """Return how many numbers between those of the frames no file has, and the first of these.

    Frames that are numbered at a distance, such as every tenth, are taken as they are.  Names with
    several numbers, such as a date, tell nothing.
    """
    numbers = [_numbers(path) for path in frames]
    if len(numbers) < 3 or any(len(number) != 1 for number in numbers):
        return 0, 0
    steps = [later - number for (number,), (later,) in itertools.pairwise(numbers)]
    ((usual, count),) = Counter(steps).most_common(1)
    if usual <= 0 or 2 * count <= len(steps):
        return 0, 0
    gaps = [(step // usual - 1, at) for step, (at,) in zip(steps, numbers, strict=False)]
    first = next((at + usual for num, at in gaps if num > 0), 0)
    return sum(max(num, 0) for num, _ in gaps), first


def _most(images: Sequence[str], names: Sequence[str | None]) -> list[str] | None:
    """Return the images of the commonest name if they are more than half, else none."""
    ((name, count),) = Counter(names).most_common(1)
    if name is None or 2 * count <= len(images):
        return None
    return [path for path, own in zip(images, names, strict=True) if own == name]


def _text_before_number(path: str) -> str | None:
    match = re.match(r"\D*(?=\d)", _stem(path))
    return match[0].lower() if match else None


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", _stem(path)))


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "#", os.path.basename(path).lower())


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
