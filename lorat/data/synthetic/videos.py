"""Synthetic videos: textured things that move, turn, grow, deform and hide.

A video is a pure function of (split, number): a panning, zooming textured background with clutter;
a target; distractors of the same kind and similar colours; bars that pass in front.  The splits
draw from disjoint streams of random numbers, so no video is in two of them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from tqdm import tqdm

from lorat.data.shards import images as shards
from lorat.data.shards.conversion import encode_frame
from lorat.data.shards.manifest import dataset_info, shard_name
from lorat.data.shards.verification import rebuild_index
from lorat.data.shards.windows import WindowLaw
from lorat.data.synthetic.scene import BRISK, GENTLE, HEIGHT, WIDTH, Pace, Scene
from lorat.errors import UserError
from lorat.files import storage
from lorat.files.scratch import make_public_folder
from lorat.image.boxes import usable

Split = Literal["train", "val", "pretrain"]
VERSION = 4
"""Part of the folder's name; raise it when a change alters any pixel."""
_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """How much of a split is made."""

    stream: int
    """First element of every random seed of the split."""
    num_videos: int
    num_frames: int
    windowed: bool
    pace: Pace


SPLITS: dict[str, SplitSize] = {
    "train": SplitSize(stream=101, num_videos=240, num_frames=40, windowed=True, pace=GENTLE),
    "val": SplitSize(stream=202, num_videos=16, num_frames=60, windowed=False, pace=GENTLE),
    "pretrain": SplitSize(stream=303, num_videos=480, num_frames=40, windowed=True, pace=BRISK),
}
_VIDEOS_PER_SHARD = 4


@dataclass(frozen=True, kw_only=True)
class Video:
    """One rendered video.

    Attributes:
        images: RGB uint8 (HEIGHT, WIDTH, 3) each.
        box: float64 (n, 4), xyxy of the target's outline inside the frame.
        visible: float64 (n), visible share of the outline inside the frame, 0 to 1.
    """

    name: str
    images: list[np.ndarray]
    box: np.ndarray
    visible: np.ndarray


def render(split: Split, number: int, num_frames: int | None = None) -> Video:
    """Render video ``number`` of a split; the target is in plain view in the first frame.

    Args:
        num_frames: none means the split's own length.
    """
    size = SPLITS[split]
    count = num_frames or size.num_frames
    for attempt in range(20):
        scene = Scene(np.random.default_rng([size.stream, number, attempt]), size.pace)
        image, box, visible = scene.frame(0)
        if visible > 0.9 and usable(box, (WIDTH, HEIGHT)):
            break
    frames = [(image, box, visible), *(scene.frame(t) for t in range(1, count))]
    images, boxes, shares = zip(*frames, strict=True)
    return Video(
        name=f"{split}-{number:04d}",
        images=list(images),
        box=np.stack(boxes),
        visible=np.array(shares),
    )


def ensure(cache_dir: str | os.PathLike[str] | None = None, split: Split = "train") -> str:
    """Return the URI of a synthetic split's shards, making them on first use.

    Several processes may call this at once: one makes the shards, the others wait.

    Args:
        cache_dir: parent folder; none means the cache folder.

    Raises:
        UserError: if the split is unknown.
    """
    if split not in SPLITS:
        raise UserError(f"There is no synthetic split {split}; choose from {', '.join(SPLITS)}.")
    parent = storage.cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    target = parent / f"synthetic-v{VERSION}-{split}"
    if not target.is_dir():
        storage.locate(parent).make()
        with open(parent / f".{target.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _make(target, split)
    return str(target.resolve())


def _make(target: Path, split: Split) -> None:
    folder = make_public_folder(f".{target.name}", target.parent)
    num_shards = -(-SPLITS[split].num_videos // _VIDEOS_PER_SHARD)
    num_workers = min(os.cpu_count() or 1, num_shards, 16)
    # Plain child processes: they need neither fork (unsafe beside threads) nor the main module.
    code = "import json, sys; from lorat.data import synthetic\n"
    code += "synthetic.write_shards(*json.loads(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    children = []
    try:
        for worker in range(num_workers):
            arguments = json.dumps(
                [str(folder), split, list(range(worker, num_shards, num_workers))]
            )
            command = [sys.executable, "-c", code, arguments]
            children.append(subprocess.Popen(command, env=environment))
        with tqdm(total=num_shards, desc=f"synthetic {split} videos", unit="shard") as bar:
            while bar.n < num_shards:
                finished = len(list(folder.glob("shard-*.parquet")))
                if finished > bar.n:
                    bar.update(finished - bar.n)
                codes = [c.poll() for c in children]
                if any(codes):
                    raise RuntimeError(
                        f"A process that renders videos failed (exit codes {codes})."
                    )
                time.sleep(0.1)
        rebuild_index(str(folder))
        os.rename(folder, target)
    finally:
        for child in children:
            child.terminate()
            child.wait()
        shutil.rmtree(folder, ignore_errors=True)


def write_shards(folder: str, split: Split, numbers: list[int]) -> None:
    """Render and write some shards of a split (one process's share)."""
    cv2.setNumThreads(1)
    size = SPLITS[split]
    law = WindowLaw() if size.windowed else None
    info = dataset_info(name="synthetic", split=split, law=law)
    for number in numbers:
        first = number * _VIDEOS_PER_SHARD
        with shards.ShardWriter(storage.locate(folder), shard_name(number), info) as writer:
            for video in range(first, min(first + _VIDEOS_PER_SHARD, size.num_videos)):
                rendered = render(split, video)
                writer.begin_track(rendered.name, "synthetic")
                for t, image in enumerate(rendered.images):
                    visible = bool(rendered.visible[t] > 0.1)
                    box = rendered.box[t]
                    frame = encode_frame(
                        image,
                        raw=None,
                        frame_number=t,
                        box=box,
                        valid=bool(visible and usable(box, (WIDTH, HEIGHT))),
                        visible=visible,
                        law=law,
                        quality=_QUALITY,
                    )
                    writer.append(frame)
            writer.close()
