"""Video files of any name, read frame by frame with the times at which the frames are shown.

PyAV is loaded when the first file is opened: once it is, OpenCV hangs when it opens its first
window.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from lorat.errors import UserError, cannot_read, named

USUAL_FPS = 25.0
"""Where a file does not say; also where it says what is the grain of its clock (1000 in WebM)."""
_MAX_FPS = 240.0
_RESTART_S = 1.0
"""A clock that goes back by more has begun anew, as where files were joined."""
_LEAST_STEP_S = 1e-4


class Clock:
    """Times of frames, ascending from 0 s, from stamps that may be missing, equal or go back.

    Args:
        step_s: from a frame to one that has no stamp of its own.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._start = 0.0
        self._stamp: float | None = None
        self._time: float | None = None
        self.num_odd = 0
        """Frames whose stamps were missing, equal to the one before, or went back."""

    def tell(self, stamp: float | None) -> float:
        """Return the time in seconds of the next frame in order."""
        last, before = self._time, self._stamp
        self._stamp = stamp if stamp is not None else before
        if last is None:
            self._start, self._time = stamp or 0.0, 0.0
            self.num_odd += stamp is None
        elif stamp is None or stamp == before:
            self._time = last + self._step_s
            self.num_odd += 1
        elif before is not None and stamp < before - _RESTART_S:
            self._time = last + self._step_s
            self._start = stamp - self._time
            self.num_odd += 1
        else:
            self._time = max(stamp - self._start, last + _LEAST_STEP_S)
            self.num_odd += before is not None and stamp < before
        return self._time


class VideoFile:
    """Frames of a video file, turned as players turn them, decoded as they are asked for, once.

    Args:
        path: any path that the file system has.

    Raises:
        UserError: if it may not be read, or is no video.
    """

    def __init__(self, path: str | Path) -> None:
        import av

        self.path = path
        self.damage: list[str] = []
        """What could not be decoded and where, known when all frames were given."""
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise cannot_read(named(path), error) from error
        try:
            # The scheme keeps FFmpeg from taking what stands before a colon for one.
            self._container: Any = av.open(f"file:{os.path.abspath(path)}")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise self._no_video(getattr(error, "strerror", None) or str(error)) from error
        self._stream = cast(Any, self._container.streams.best("video"))
        if self._stream is None or self._stream.codec_context is None:
            raise self._no_video("it has no picture that can be decoded")
        self._stream.thread_type = "AUTO"
        rate = float(self._stream.average_rate or 0)
        self.fps = rate if 1 <= rate <= _MAX_FPS else USUAL_FPS
        """Frames per second as the file says; those of a variable rate have their times alone."""
        self._is_avi = self._container.format.name == "avi"
        announced = int(self._stream.frames)
        self.num_frames = announced if announced > 0 else None
        """Number of frames; none where the file does not say."""
        self._clock = Clock(1 / self.fps)

    def _no_video(self, why: str) -> UserError:
        return UserError(
            f"{named(self.path)} cannot be read as a video ({why}); give a video file or a folder."
        )

    @property
    def num_odd_stamps(self) -> int:
        """Frames given so far without a time stamp of their own in order."""
        return self._clock.num_odd

    def close(self) -> None:
        """Let go of the file; no frame can be read any more."""
        self._container.close()

    def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
        """Yield each frame, uint8 RGB (H, W, 3), and its time in seconds since the first.

        What cannot be decoded is left out and noted in :attr:`damage`.
        """
        import av

        num_given, end_s, longest_s = 0, 0.0, 1 / self.fps
        with self._container as container:
            packets = container.demux(self._stream)
            while True:
                where = f"after {num_given} frames, at {end_s:.2f} s"
                try:
                    packet = next(packets, None)
                except (av.error.FFmpegError, OSError) as error:
                    self.damage.append(f"it cannot be read {where}: {error.strerror}")
                    break
                if packet is None:
                    break
                if packet.is_corrupt:
                    self.damage.append(f"what comes {where} is incomplete")
                try:
                    frames = packet.decode()
                except av.error.EOFError:  # of a decoder that was emptied before
                    continue
                except av.error.FFmpegError as error:
                    self.damage.append(f"what comes {where} cannot be decoded: {error.strerror}")
                    continue
                for frame in frames:
                    before_s = end_s
                    end_s = self._clock.tell(self._stamp_s(frame))
                    longest_s = max(longest_s, end_s - before_s)
                    num_given += 1
                    yield _upright(frame), end_s
            announced = self._announced(container, num_given, end_s + 3 * longest_s)
            if announced:
                self.damage.append(f"it announces {announced}, but only {num_given} can be decoded")

    def _stamp_s(self, frame: Any) -> float | None:
        """Return when a frame is shown as the file says in seconds, none where it does not.

        AVI knows the order of decoding alone, which FFmpeg passes on as a wrong one of showing.
        """
        order = frame.dts if self._is_avi or frame.pts is None else frame.pts
        return None if order is None else float(order * frame.time_base)

    def _announced(self, container: Any, num_given: int, end_s: float) -> str:
        """Return how much a file announces that ends too early, else nothing."""
        whole_s = (container.duration or 0) / 1e6
        early = whole_s > end_s + 0.5
        if self.num_frames is not None:
            # Some files tell a duration, from which the number of frames is off by one; of a
            # shortened MP4, some frames are not to be shown.
            fewer = num_given < self.num_frames - 1
            fewer = fewer and (early or "mp4" not in container.format.name)
            return f"{self.num_frames} frames" if fewer else ""
        # Beside another stream, that one may be the longer.
        return f"{whole_s:.2f} s" if early and len(container.streams) == 1 else ""


def _upright(frame: Any) -> np.ndarray:
    """Return a decoded frame as an array, turned as the file says it is shown."""
    image = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
