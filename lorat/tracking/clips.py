"""Annotated videos that browsers play: H.264 in MP4, or VP8 in WebM.

OpenCV's own wheel can only write formats that no browser plays, or VP8 at half a frame per
second, so PyAV encodes here.  It is loaded when the first frame is written: once it is, OpenCV
hangs when it opens its first window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np

from lorat.errors import UserError

CODECS: dict[str, tuple[str, dict[str, str]]] = {
    ".mp4": ("libx264", {"crf": "23", "preset": "veryfast"}),
    ".webm": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "2M"}),
}
"""Encoder and its options by the file's suffix."""
PREDICTED_RGB = (255, 64, 64)
TRUTH_RGB = (64, 220, 64)
TEXT_RGB = (255, 255, 255)


class ClipWriter:
    """Write RGB frames as a video; use as a context manager.

    Args:
        path: ``.mp4`` or ``.webm``; not there, or whole, when an exception ends the block.
        fps: frames per second.
        max_side: larger frames are reduced to this many pixels.

    Raises:
        UserError: for another suffix.
    """

    def __init__(self, path: str | Path, *, fps: float = 25.0, max_side: int | None = None) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in CODECS:
            raise UserError(
                f"Videos are written as {' or '.join(CODECS)}; {self.path.name} is neither."
            )
        self._codec, self._options = CODECS[self.path.suffix.lower()]
        self._fps = round(fps * 1000)
        self._max_side = max_side
        self._size_wh: tuple[int, int] | None = None
        self._part = self.path.with_name(f".{self.path.stem}.part{self.path.suffix.lower()}")
        self._container: Any = None
        self._stream: Any = None

    def write(self, frame: np.ndarray) -> None:
        """Append a uint8 RGB frame; one of another size than the first is fitted in."""
        height, width = frame.shape[:2]
        if self._size_wh is None:
            self._open(width, height)
        assert self._size_wh is not None
        if (width, height) != self._size_wh:
            frame = _fit(frame, self._size_wh)
        import av

        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        self._mux(self._stream.encode(picture))

    def _open(self, width: int, height: int) -> None:
        from fractions import Fraction

        import av

        scale = min(1.0, (self._max_side or max(width, height)) / max(width, height))
        # 4:2:0 video has even sides.
        even = [max(2, round(side * scale) // 2 * 2) for side in (width, height)]
        self._size_wh = (even[0], even[1])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fast = {"movflags": "+faststart"} if self._part.suffix == ".mp4" else {}
        self._container = av.open(str(self._part), "w", options=fast)
        self._stream = self._container.add_stream(
            self._codec, rate=Fraction(self._fps, 1000), options=self._options
        )
        self._stream.width, self._stream.height = self._size_wh
        self._stream.pix_fmt = "yuv420p"

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
        if kind is None:
            self._mux(self._stream.encode())
        self._container.close()
        if kind is None:
            self._part.replace(self.path)
        else:
            self._part.unlink(missing_ok=True)


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
    height, width = drawn.shape[:2]
    thickness = max(2, round(max(height, width) / 320))
    for box, color in ((truth, TRUTH_RGB), (predicted, PREDICTED_RGB)):
        if box is not None and np.isfinite(box).all():
            x1, y1, x2, y2 = (round(float(value)) for value in box)
            cv2.rectangle(drawn, (x1, y1), (x2, y2), color, thickness)
    if text:
        font, scale, weight = cv2.FONT_HERSHEY_SIMPLEX, max(0.4, width / 1000), 1 + width // 900
        (text_width, text_height), base = cv2.getTextSize(text, font, scale, weight)
        bottom = text_height + 2 * base
        cv2.rectangle(drawn, (0, 0), (text_width + 2 * base, bottom), (0, 0, 0), cv2.FILLED)
        place = (base, bottom - base)
        cv2.putText(drawn, text, place, font, scale, TEXT_RGB, weight, cv2.LINE_AA)
    return drawn
