"""Frames to track in: a video file, a folder of images, or a camera."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from lorat.errors import UserError
from lorat.image.codec import DamagedImage, decode_rgb

log = logging.getLogger(__name__)

# OpenCV's reader takes this when it opens its first video; what is wrong with one is said here.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_MAX_ROUNDED_FRAMES = 1
"""Some files tell a duration, from which the number of frames is off by one."""


class VideoSource:
    """RGB frames in order, decoded as they are asked for.

    Args:
        source: a video file, a folder of images (sorted by the numbers in their names), or
            ``camera`` or ``camera:N``.

    Raises:
        UserError: if there is no such thing, or nothing in it can be read.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.fps = 25.0
        """Frames per second; 25 for a folder."""
        self.num_frames: int | None = None
        """Number of frames; none for a camera or where the file does not say."""
        self._images: list[Path] = []
        self._capture: cv2.VideoCapture | None = None
        if match := re.fullmatch(r"camera(?::(\d+))?", source):
            self._open_capture(int(match[1] or 0), "The camera cannot be opened; is it connected?")
            return
        path = Path(source).expanduser()
        if path.is_dir():
            self._images = sorted(
                (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=_number_key
            )
            if not self._images:
                raise UserError(
                    f"The folder {source} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                    "give the folder with the frames."
                )
            self.num_frames = len(self._images)
        elif path.is_file():
            self._open_capture(
                str(path), f"{source} cannot be read as a video; give a video file or a folder."
            )
        else:
            raise UserError(
                f"There is no {source}; give a video file, a folder of images, or camera:0."
            )

    def _open_capture(self, target: str | int, message: str) -> None:
        # OpenCV and FFmpeg print what they think of a file that is no video; one error is enough.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            capture = cv2.VideoCapture(target)
        finally:
            cv2.utils.logging.setLogLevel(level)
        if not capture.isOpened():
            raise UserError(message)
        self._capture = capture
        fps = capture.get(cv2.CAP_PROP_FPS)
        if 1 <= fps <= 1000:
            self.fps = float(fps)
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.num_frames = count if count > 0 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield uint8 RGB frames (H, W, 3); a video that ends early is warned of by name.

        Raises:
            UserError: if the first frame, or an image of a folder, cannot be decoded.
        """
        if self._capture is None:
            for image in self._images:
                try:
                    yield decode_rgb(image.read_bytes())
                except DamagedImage as error:
                    raise UserError(f"{image} cannot be read ({error}); repair it.") from error
            return
        num_seen = 0
        while True:
            there, frame = self._capture.read()
            if not there:
                break
            num_seen += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        self._capture.release()
        if not num_seen:
            raise UserError(f"{self.source} has no frame that can be decoded; give another video.")
        if self.num_frames is not None and num_seen < self.num_frames - _MAX_ROUNDED_FRAMES:
            log.warning(
                "%s announces %d frames, but only %d can be decoded; it is damaged or cut.",
                self.source, self.num_frames, num_seen,
            )  # fmt: skip


def _number_key(path: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", path.stem)], path.name
