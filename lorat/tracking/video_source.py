"""Frames to track in: a video file, a folder of images, or a camera."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lorat.errors import UserError, cannot_read, named, reason
from lorat.image.codec import DamagedImage, decode_complete
from lorat.image.frame_files import IMAGE_SUFFIXES, list_images, missing_numbers, tell_frames
from lorat.image.video_file import USUAL_FPS, VideoFile

log = logging.getLogger(__name__)

_MAX_NOTES = 10
"""Places of damage in a video that are each said."""
_MAX_DELAYED = 2
"""Frames that decoders often give at the end, without stamps."""


@contextlib.contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Let OpenCV not print what it thinks of a camera or an image; one error of ours is enough."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


@dataclass(frozen=True)
class Frame:
    """A frame and when it is shown."""

    image: np.ndarray
    """RGB uint8 (H, W, 3); the one before where it cannot be decoded."""
    time_s: float
    """Seconds since the first frame."""
    damaged: bool = False
    """It cannot be decoded."""


class VideoSource:
    """Frames in order, decoded as they are asked for.

    Args:
        source: a video file, a folder of images (by the numbers in their names), or ``camera`` or
            ``camera:N``; ``./camera`` is a file of that name.

    Raises:
        UserError: if there is no such thing, or nothing in it can be read.
    """

    def __init__(self, source: str) -> None:
        self.source = named(source)
        self.fps = USUAL_FPS
        """Frames per second as far as that is known; 25 for a folder."""
        self.num_frames: int | None = None
        """Number of frames; none for a camera or where the file does not say."""
        self.num_damaged = 0
        """Frames, or places of a video, that could not be decoded so far; each is said in the log,
        as is all else that is odd."""
        self._images: tuple[str, ...] = ()
        self._video: VideoFile | None = None
        self._camera: cv2.VideoCapture | None = None
        if match := re.fullmatch(r"camera(?::(\d+))?", source):
            self._open_camera(int(match[1] or 0))
            return
        # A name may begin with a tilde; shells have expanded those that mean a home folder.
        path = Path(source if os.path.lexists(source) else os.path.expanduser(source))
        if source and path.is_dir():
            self._images = self._frames_of(path)
            self.num_frames = len(self._images)
        elif source and path.is_file():
            self._video = VideoFile(path)
            self.fps, self.num_frames = self._video.fps, self._video.num_frames
        else:
            raise UserError(
                f"There is no {self.source}; give a video file, a folder of images, or camera:0."
            )

    def _frames_of(self, folder: Path) -> tuple[str, ...]:
        try:
            images = list_images(folder)
        except OSError as error:
            raise cannot_read(self.source, error) from error
        if not images:
            raise UserError(
                f"The folder {self.source} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                "give the folder with the frames."
            )
        told = tell_frames(images)
        names = [named(os.path.basename(path)) for path in images]
        if told is None:
            raise UserError(
                f"The names of the {len(images)} images in {self.source} do not tell which of them "
                f"are the frames, and in which order ({names[0]}, ..., {names[-1]}); give a folder "
                "with the frames alone, numbered."
            )
        if told.others:
            others = [named(os.path.basename(path)) for path in told.others]
            log.warning(
                "%s: left out, since not named as the frames (%s, ...): %s.",
                self.source, named(os.path.basename(told.frames[0])),
                ", ".join(others[:3]) + (f", ... ({len(others)} images)" if others[3:] else ""),
            )  # fmt: skip
        num_missing, first = missing_numbers(told.frames)
        if num_missing:
            log.warning(
                "%s: the numbers of %d frames are missing (the first one is %d); the frames are "
                "taken as following one another.", self.source, num_missing, first,
            )  # fmt: skip
        return told.frames

    def _open_camera(self, number: int) -> None:
        with _quiet_opencv():
            camera = cv2.VideoCapture(number)
        if not camera.isOpened():
            raise UserError("The camera cannot be opened; is it connected?")
        self._camera = camera
        fps = camera.get(cv2.CAP_PROP_FPS)
        if 1 <= fps <= 1000:
            self.fps = float(fps)

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames; an image that cannot be decoded is said.

        Raises:
            UserError: if the first frame cannot be decoded.
        """
        if self._video is not None:
            return self._of_video(self._video)
        return self._of_folder() if self._camera is None else self._of_camera(self._camera)

    def _of_folder(self) -> Iterator[Frame]:
        image = np.empty(0)
        for number, path in enumerate(self._images):
            damaged = False
            try:
                data = Path(path).read_bytes()
                with _quiet_opencv():
                    image = decode_complete(data)
            except (DamagedImage, OSError) as error:
                damaged, why = True, f"{named(path)} cannot be read ({reason(error)})"
                if number == 0:
                    raise UserError(f"{why}; repair it or leave it out.") from error
                self._note(f"{why}; the box before is repeated with score 0.")
            yield Frame(image, number / self.fps, damaged)

    def _of_video(self, video: VideoFile) -> Iterator[Frame]:
        num_given = 0
        for image, time_s in video:
            num_given += 1
            yield Frame(image, time_s)
        if not num_given:
            raise UserError(f"{self.source} has no frame that can be decoded; give another video.")
        for what in video.damage[:_MAX_NOTES]:
            self._note(f"{self.source} is damaged or cut: {what}.")
        if more := video.damage[_MAX_NOTES:]:
            self._note(f"{self.source} is damaged in {len(more)} more places.")
        if video.num_odd_stamps > max(_MAX_DELAYED, num_given // 10):
            log.warning(
                "%s: %d frames have no time stamp in order; they are taken as following one "
                "another at %g a second.", self.source, video.num_odd_stamps, video.fps,
            )  # fmt: skip

    def _of_camera(self, camera: cv2.VideoCapture) -> Iterator[Frame]:
        began = None
        while (shot := camera.read())[0]:
            now = time.monotonic()
            began = now if began is None else began
            yield Frame(cv2.cvtColor(shot[1], cv2.COLOR_BGR2RGB), now - began)
        camera.release()
        if began is None:
            raise UserError(f"{self.source} gives no frame; is the camera in use elsewhere?")

    def _note(self, text: str) -> None:
        self.num_damaged += 1
        log.warning("%s", text)
