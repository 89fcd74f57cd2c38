"""Annotated videos that browsers play: H.264 in MP4, or VP8 in WebM.

OpenCV's own wheel can only write formats that no browser plays, or VP8 at half a frame per
second, so PyAV encodes here.  It is loaded when the first frame is written: once it is, OpenCV
hangs when it opens its first window.

Frames are written with their times, so a variable rate stays one.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np

from lorat.errors import UserError, named
from lorat.files.outputs import check_file
from lorat.files.scratch import whole_file
from lorat.metrics.result_files import box_files

CODECS: dict[str, tuple[str, dict[str, str]]] = {
    # Frames that refer to later ones end up after the end of an MP4 whose last one is shown long.
    ".mp4": ("libx264", {"crf": "23", "preset": "veryfast", "bf": "0"}),
    ".webm": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "2M"}),
}
"""Encoder and its options by the file's suffix."""
_TICKS_PER_S = {".mp4": 90_000, ".webm": 1000}
"""Grain of the times in a file; that of WebM is fixed."""
PREDICTED_RGB = (255, 64, 64)
TRUTH_RGB = (64, 220, 64)
TEXT_RGB = (255, 255, 255)
OBJECTS_RGB = (
    PREDICTED_RGB, (64, 160, 255), (255, 196, 0), (80, 220, 120), (214, 96, 255), (0, 214, 214),
    (255, 128, 0), (255, 128, 192),
)  # fmt: skip
"""Colours of several objects, in their order, and then again."""


def check_outputs(clip: Path, source: str) -> None:
    """Refuse a place for an annotated video and its boxes before the work; nothing is made.

    Args:
        clip: the video; the boxes' files lie beside it.
        source: what is tracked in.

    Raises:
        UserError: for an unknown suffix, the source itself, or where no file can be written.
    """
    if clip.suffix.lower() not in CODECS:
        raise UserError(f"output is {named(clip)}; give a name in {' or '.join(CODECS)}.")
    if os.path.realpath(clip) in {
        os.path.realpath(source),
        os.path.realpath(os.path.expanduser(source)),
    }:
        raise UserError(f"output is {named(clip)}, the video itself; give another name.")
    for file in (clip, *box_files(clip)):
        check_file(file)


class ClipWriter:
    """Write RGB frames as a video; use as a context manager.

    Args:
        path: ``.mp4`` or ``.webm``; not there, or whole, when an exception ends the block.
        fps: frames per second, where frames come without times.
        max_side: larger frames are reduced to this many pixels.

    Raises:
        UserError: for another suffix.
    """

    def __init__(self, path: str | Path, *, fps: float = 25.0, max_side: int | None = None) -> None:
        self.path = Path(path)
        self._suffix = self.path.suffix.lower()
        if self._suffix not in CODECS:
            raise UserError(
                f"Videos are written as {' or '.join(CODECS)}; {named(self.path.name)} is neither."
            )
        self._codec, self._options = CODECS[self._suffix]
        self._rate = Fraction(round(fps * 1000), 1000)
        self._max_side = max_side
        self._size_wh: tuple[int, int] | None = None
        self._file = contextlib.ExitStack()
        self._container: Any = None
        self._stream: Any = None
        self._next_s = 0.0
        self._waiting: Any = None  # until the next frame says how long it is shown
        self._steps: list[int] = []

    def write(self, frame: np.ndarray, time_s: float | None = None) -> None:
        """Append a uint8 RGB frame; one of another size than the first is fitted in.

        Args:
            frame: the picture.
            time_s: when it is shown, in seconds, ascending; none means at the rate of the clip.
        """
        height, width = frame.shape[:2]
        if self._size_wh is None:
            self._open(width, height)
        assert self._size_wh is not None
        if (width, height) != self._size_wh:
            frame = _fit(frame, self._size_wh)
        import av

        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        time_s = self._next_s if time_s is None else time_s
        self._next_s = time_s + float(1 / self._rate)
        ticks = _TICKS_PER_S[self._suffix]
        picture.pts, picture.time_base = round(time_s * ticks), Fraction(1, ticks)
        if self._waiting is not None:
            picture.pts = max(picture.pts, self._waiting.pts + 1)
            self._steps.append(picture.pts - self._waiting.pts)
            self._encode(self._steps[-1])
        self._waiting = picture

    def _open(self, width: int, height: int) -> None:
        import av

        scale = min(1.0, (self._max_side or max(width, height)) / max(width, height))
        # 4:2:0 video has even sides.
        even = [max(2, round(side * scale) // 2 * 2) for side in (width, height)]
        self._size_wh = (even[0], even[1])
        part = self._file.enter_context(whole_file(self.path))
        fast = {"movflags": "+faststart"} if self._suffix == ".mp4" else {}
        # The scheme keeps FFmpeg from taking what stands before a colon for one.
        self._container = av.open(
            f"file:{os.path.abspath(part)}", "w", format=self._suffix[1:], options=fast
        )
        self._stream = self._container.add_stream(
            self._codec, rate=self._rate, options=self._options
        )
        self._stream.width, self._stream.height = self._size_wh
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS_PER_S[self._suffix])

    def _encode(self, duration: int) -> None:
        """Encode the waiting frame, which is shown for so many ticks."""
        self._waiting.duration = duration
        self._mux(self._stream.encode(self._waiting))

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            self._container.mux(packet)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._container is None:
            return
        try:
            if kind is None:
                usual = round(_TICKS_PER_S[self._suffix] / self._rate)
                self._encode(round(statistics.median(self._steps)) if self._steps else usual)
                self._mux(self._stream.encode())
            self._container.close()
        except BaseException:
            self._file.__exit__(*sys.exc_info())
            raise
        self._file.__exit__(kind, error, trace)


def _fit(frame: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    """Scale a frame into a canvas of another size without distorting it."""
    height, width = frame.shape[:2]
    scale = min(size_wh[0] / width, size_wh[1] / height)
    new_wh = (min(size_wh[0], round(width * scale)), min(size_wh[1], round(height * scale)))
    if abs(new_wh[0] - size_wh[0]) <= 1 and abs(new_wh[1] - size_wh[1]) <= 1:
        return cv2.resize(frame, size_wh, interpolation=cv2.INTER_AREA)
    canvas = np.zeros((size_wh[1], size_wh[0], 3), np.uint8)
    canvas[: new_wh[1], : new_wh[0]] = cv2.resize(frame, new_wh, interpolation=cv2.INTER_AREA)
    return canvas


def annotate(
    frame: np.ndarray,
    predicted: Sequence[float] | None,
    *,
    truth: Sequence[float] | None = None,
    text: str = "",
) -> np.ndarray:
    """Return a copy of an RGB frame with boxes (xyxy) and a line of text.

    Args:
        frame: uint8 RGB.
        predicted: drawn in red.
        truth: drawn in green, under the other one.
        text: drawn at the top left.
    """
    drawn = np.ascontiguousarray(frame).copy()
    for box, color in ((truth, TRUTH_RGB), (predicted, PREDICTED_RGB)):
        _draw_box(drawn, box, color)
    if text:
        _write(drawn, text, (0, 0))
    return drawn


def annotate_objects(
    frame: np.ndarray, boxes: np.ndarray, scores: np.ndarray | None = None
) -> np.ndarray:
    """Return a copy of an RGB frame with the boxes of all objects, each in its colour.

    Args:
        frame: uint8 RGB.
        boxes: (k, 4) xyxy; NaN where an object has none.  Several get their numbers, from 1.
        scores: (k,), of which a single object's is written at the top left; none means no text.
    """
    if len(boxes) == 1:
        return annotate(frame, boxes[0], text="" if scores is None else f"{scores[0]:.2f}")
    drawn = np.ascontiguousarray(frame).copy()
    for number, box in enumerate(boxes):
        color = OBJECTS_RGB[number % len(OBJECTS_RGB)]
        _draw_box(drawn, box, color)
        if np.isfinite(box).all():
            _write(drawn, str(number + 1), (round(float(box[0])), round(float(box[1]))), color)
    return drawn


def _draw_box(
    drawn: np.ndarray, box: Sequence[float] | np.ndarray | None, color: tuple[int, int, int]
) -> None:
    if box is None or not np.isfinite(box).all():
        return
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    cv2.rectangle(drawn, (x1, y1), (x2, y2), color, max(2, round(max(drawn.shape[:2]) / 320)))


def _write(
    drawn: np.ndarray,
    text: str,
    place: tuple[int, int],
    ground: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Write a line of text on a ground whose top left corner lies at a place of the frame."""
    width = drawn.shape[1]
    font, scale, weight = cv2.FONT_HERSHEY_SIMPLEX, max(0.4, width / 1000), 1 + width // 900
    (text_width, text_height), base = cv2.getTextSize(text, font, scale, weight)
    x, y = place
    end = (x + text_width + 2 * base, y + text_height + 2 * base)
    cv2.rectangle(drawn, (x, y), end, ground, cv2.FILLED)
    cv2.putText(drawn, text, (x + base, end[1] - base), font, scale, TEXT_RGB, weight, cv2.LINE_AA)
