"""Track an object through a video and write the annotated video and the boxes.

python jobs/track.py video.mp4 --box 100,80,60,90
python jobs/track.py FOLDER --box 100,80,60,90 --model models:/lorat@champion --output out.mp4
python jobs/track.py camera:0 --select
"""

from __future__ import annotations

import bootstrap  # noqa: F401

import csv
import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import command
import numpy as np
import tyro
from tqdm import tqdm

from lorat.config import fields
from lorat.config.bounds import Count, check_bounds
from lorat.errors import UserError
from lorat.image.boxes import xywh_from_xyxy, xyxy_from_xywh
from lorat.tracking.clips import CODECS, ClipWriter, annotate
from lorat.tracking.video_source import VideoSource
from lorat_platform.evaluation.subject import load_subject

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Track one object, given by its box in the first frame."""

    source: tyro.conf.Positional[str]
    """A video file, a folder of images, or camera:0."""
    box: str | None = None
    """The object in the first frame: left,top,width,height in pixels."""
    select: bool = False
    """Draw the box in a window instead."""
    model: str = "models:/lorat@champion"
    """Registered model, checkpoint folder or released file; or static, mil."""
    variant: str | None = None
    """Variant of a released file, which does not name it."""
    output: Path = Path("tracked.mp4")
    """Annotated video, .mp4 or .webm; the boxes go beside it as .csv and .json."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Auto means the GPU where there is one."""
    show: bool = False
    """Show the video while tracking; q ends it."""
    max_frames: Count | None = None
    """Stop after this many frames, 1 to 1,000,000,000."""

    def __post_init__(self) -> None:
        check_bounds(self, fields.flag)
        if self.output.suffix.lower() not in CODECS:
            raise UserError(f"output is {self.output}; give a name in {' or '.join(CODECS)}.")
        if self.output.resolve() == Path(self.source).expanduser().resolve():
            raise UserError(f"output is {self.output}, the video itself; give another name.")
        if (self.box is None) != self.select:
            raise UserError("The object is not given once; give either --box L,T,W,H or --select.")


def parse_box(text: str) -> np.ndarray:
    """Return xyxy of ``left,top,width,height``.

    Raises:
        UserError: if it is not four numbers with positive sides.
    """
    try:
        values = np.array([float(part) for part in text.split(",")])
    except ValueError:
        values = np.empty(0)
    if values.shape != (4,) or not np.isfinite(values).all() or not (values[2:] > 0).all():
        raise UserError(
            f"The box is {text}; give left,top,width,height in pixels, such as 100,80,60,90."
        )
    return xyxy_from_xywh(values)


def check_inside(box: np.ndarray, frame: np.ndarray) -> None:
    """Refuse a box that does not lie in the frame.

    Raises:
        UserError: if less than a pixel of it does, or it sticks out.
    """
    height, width = frame.shape[:2]
    if (box[:2] < 0).any() or box[2] > width or box[3] > height:
        given = ",".join(f"{value:g}" for value in xywh_from_xyxy(box))
        raise UserError(
            f"The box {given} does not lie inside the first frame of {width}x{height} pixels; "
            "give left,top,width,height within it."
        )


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


def torch_device(name: str) -> str | None:
    """Return torch's name of a device; none means whatever is there.

    Raises:
        UserError: for a GPU where there is none.
    """
    if name == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device is gpu, but this machine has none; give cpu or auto.")
        return "cuda"
    return None if name == "auto" else name


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


def write_boxes(path: Path, boxes: list[np.ndarray], scores: list[float], about: dict) -> None:
    """Write boxes as CSV (frame, x, y, w, h, score) and JSON beside the video."""
    xywh = xywh_from_xyxy(np.array(boxes))
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["frame", "x", "y", "w", "h", "score"])
        for frame, (row, score) in enumerate(zip(xywh, scores, strict=True)):
            writer.writerow([frame, *(f"{value:.3f}" for value in row), f"{score:.4f}"])
    content = about | {
        "boxes_xywh": np.round(xywh, 3).tolist(),
        "scores": np.round(scores, 4).tolist(),
    }
    path.with_suffix(".json").write_text(json.dumps(content) + "\n")


def main() -> int:
    """Run the job."""
    options = command.parse(Options, description=__doc__)
    given = parse_box(options.box) if options.box else None
    for option in ("select", "show"):
        if getattr(options, option):
            need_screen(f"--{option}")
    source = VideoSource(options.source)
    frames = iter(source)
    first = next(frames)
    if given is not None:
        check_inside(given, first)
    device = torch_device(options.device)
    subject = load_subject(options.model, variant=options.variant)
    tracker = subject.tracker(device)
    box = select_box(first) if given is None else given

    total = source.num_frames
    if options.max_frames is not None:
        total = min(total or options.max_frames, options.max_frames)
    targets = tracker.start([first], [box])
    boxes, scores, seconds = [box], [1.0], 0.0
    interrupted = False
    with (
        ClipWriter(options.output, fps=source.fps) as clip,
        tqdm(total=total, unit="frame", desc=subject.name) as bar,
    ):
        clip.write(annotate(first, box))
        bar.update()
        try:
            for frame in frames:
                if options.max_frames is not None and len(boxes) >= options.max_frames:
                    break
                began = time.perf_counter()
                (found,), (score,) = tracker.step(targets, [frame])
                seconds += time.perf_counter() - began
                boxes.append(found)
                scores.append(float(score))
                drawn = annotate(frame, found, text=f"{score:.2f}")
                clip.write(drawn)
                bar.update()
                if options.show and not show(drawn):
                    break
        except KeyboardInterrupt:  # what was tracked so far is written
            interrupted = True
    about = {"source": options.source, "model": subject.name, "variant": subject.variant}
    write_boxes(options.output, boxes, scores, about)
    fps = (len(boxes) - 1) / seconds if seconds else 0.0
    log.info(
        "%d frames at %.1f FPS (tracking alone): %s, %s, %s", len(boxes), fps, options.output,
        options.output.with_suffix(".csv").name, options.output.with_suffix(".json").name,
    )  # fmt: skip
    return command.EXIT_INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    command.run(main)
