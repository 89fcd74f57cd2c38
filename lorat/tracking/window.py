"""The window in which a person draws the object and watches it being tracked."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from lorat.errors import UserError
from lorat.image.boxes import xyxy_from_xywh


def need_screen(option: str) -> None:
    """Refuse an option that opens a window where there is no screen, and open the first one.

    Raises:
        UserError: if a window cannot be opened; tried in a child, since Qt ends the process.
    """
    import cv2

    probe = "import cv2; cv2.namedWindow('probe'); cv2.destroyAllWindows()"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode != 0:
        raise UserError(f"{option} needs a screen and there is none; leave it out and give --box.")
    cv2.namedWindow("probe")  # before PyAV is loaded, or OpenCV hangs in its first window
    cv2.destroyAllWindows()


def select_box(frame: np.ndarray) -> np.ndarray:
    """Let the user draw the box in a window.

    Raises:
        UserError: if nothing was drawn.
    """
    import cv2

    x, y, w, h = cv2.selectROI("draw the object, then press Enter", frame[..., ::-1].copy())
    cv2.destroyAllWindows()
    if w == 0 or h == 0:
        raise UserError("No box was drawn; drag one around the object and press Enter.")
    return xyxy_from_xywh(np.array([x, y, w, h], dtype=np.float64))


def show(frame: np.ndarray) -> bool:
    """Show a frame; False once the user wants to stop."""
    import cv2

    cv2.imshow("tracking", frame[..., ::-1])
    return cv2.waitKey(1) not in (ord("q"), 27)
