"""Track objects through a video and write the annotated video and the boxes.

python jobs/track.py video.mp4 --box 100,80,60,90
python jobs/track.py video.mp4 --box 100,80,60,90 --box 300,90,40,40
python jobs/track.py FOLDER --box 100,80,60,90 --model models:/lorat@champion --output out.mp4
python jobs/track.py camera:0 --select
"""

from __future__ import annotations

import bootstrap  # noqa: F401

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import command
import flags
import tyro
from tqdm import tqdm

from lorat.config import fields
from lorat.config.bounds import Count, check_bounds
from lorat.errors import UserError, named
from lorat.metrics.result_files import box_files, write_boxes
from lorat.tracking.clips import ClipWriter, annotate_objects, check_outputs
from lorat.tracking.first_box import FirstBox, check_inside, given_objects
from lorat.tracking.trajectory import Trajectory
from lorat.tracking.video_source import VideoSource
from lorat.tracking.window import need_screen, select_box, show
from lorat_platform.evaluation.subject import load_subject
from lorat_platform.registry import versions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Track objects, given by their boxes in the first frame."""

    source: tyro.conf.Positional[str]
    """A video file, a folder of images, or camera:0 (./camera:0 is a file)."""
    box: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The object in the first frame: left,top,width,height in pixels; again for each other one."""
    boxes: Path | None = None
    """File with objects, one a line: left,top,width,height and, if not 0, their first frame."""
    select: bool = False
    """Draw the box of one in a window instead."""
    model: str | None = None
    """Registered model, checkpoint folder or released file; or static, mil, or csrt (where
    OpenCV has it); none means models:/lorat@champion, or else models:/lorat@candidate."""
    variant: str | None = None
    """Variant of a released file, which does not name it."""
    output: Path = Path("tracked.mp4")
    """Annotated video, .mp4 or .webm; the boxes go beside it as .csv and .json, with the
    time of each frame."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Auto means the GPU where there is one."""
    show: bool = False
    """Show the video while tracking; q ends it."""
    max_frames: Count | None = None
    """Stop after this many frames, 1 to 1,000,000,000."""

    def __post_init__(self) -> None:
        check_bounds(self, fields.flag)
        check_outputs(self.output, self.source)
        if bool(self.box) + (self.boxes is not None) + self.select != 1:
            raise UserError("Give the object by one of --box L,T,W,H, --boxes FILE and --select.")


def main() -> int:
    """Run the job; 1 if a frame, or a place of the video, is damaged and was passed over."""
    options = flags.parse(Options, description=__doc__)
    objects = given_objects(options.box, options.boxes)
    for option in [name for name in ("select", "show") if getattr(options, name)]:
        need_screen(f"--{option}")
    source = VideoSource(options.source)
    first = next(frames := iter(source))
    check_inside(objects, first.image)
    if device := {"auto": None, "cpu": "cpu", "gpu": "cuda"}[options.device]:
        from lorat.tracking.tracker import resolve_device

        resolve_device(device)
    subject = load_subject(options.model or versions.usual(), variant=options.variant)
    tracker = subject.tracker(device)
    objects = objects or [FirstBox(box=select_box(first.image))]
    total = source.num_frames
    if options.max_frames is not None:
        total = min(total or options.max_frames, options.max_frames)
        frames = itertools.islice(frames, options.max_frames - 1)
    trajectory = Trajectory(tracker, first, objects)
    stopped = 0
    about = {"source": options.source, "model": subject.name, "variant": subject.variant}
    try:
        with (
            ClipWriter(options.output, fps=source.fps) as clip,
            tqdm(total=total, unit="frame", desc=subject.name) as bar,
        ):
            clip.write(annotate_objects(first.image, *trajectory.last), first.time_s)
            bar.update()
            try:
                for frame in trajectory.follow(frames):
                    drawn = annotate_objects(frame.image, *trajectory.last)
                    clip.write(drawn, frame.time_s)
                    bar.update()
                    if options.show and not show(drawn):
                        break
            except KeyboardInterrupt:  # what was tracked so far is written
                stopped = command.EXIT_INTERRUPTED
    finally:  # the boxes are there even if the clip cannot be written
        write_boxes(options.output, trajectory.boxes, trajectory.scores, trajectory.times_s, about)
    log.info(
        "%d frames at %.1f FPS (tracking alone): %s, %s, %s",
        len(trajectory.boxes), trajectory.fps, named(options.output),
        *(named(file.name) for file in box_files(options.output)),
    )  # fmt: skip
    return stopped or (command.EXIT_FAILURE if source.num_damaged else 0)


if __name__ == "__main__":
    command.run(main)
