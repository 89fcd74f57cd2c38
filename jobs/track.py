"""Track an object through a video and write the annotated video and the boxes.

python jobs/track.py video.mp4 --box 100,80,60,90
python jobs/track.py FOLDER --box 100,80,60,90 --model models:/lorat@champion --output out.mp4
python jobs/track.py camera:0 --select
"""

from __future__ import annotations

import bootstrap  # noqa: F401

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import command
import tyro
from tqdm import tqdm

from lorat.config import fields
from lorat.config.bounds import Count, check_bounds
from lorat.errors import UserError
from lorat.metrics.result_files import write_boxes
from lorat.tracking.clips import CODECS, ClipWriter, annotate
from lorat.tracking.first_box import check_inside, parse_box
from lorat.tracking.video_source import VideoSource
from lorat.tracking.window import need_screen, select_box, show
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
