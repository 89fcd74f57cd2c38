"""Milliseconds that a network takes per frame, comparable among the trials of a search.

A time alone says as much of what else runs on the node as of the network.  So the network takes
turns with a reference network, which bears the same load in the same moment; turns in which this
process lost its processor are left out; and what is reported is the median of the ratios, times
what the reference took where nothing disturbed it: one figure for the whole search.  Equal
architectures share one measurement, whatever their weights, and the ranks of adapters that are
folded in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorat.config.json_files import read_json_at
from lorat.config.variants import get_variant
from lorat.data.shards.images import ImageReader
from lorat.errors import UserError
from lorat.files import storage
from lorat.image.codec import DamagedImage
from lorat.model.network import LoRAT
from lorat.tracking.one_pass import SequenceTracker, usable_tracks
from lorat.tracking.tracker import Tracker
from lorat_platform.search.trial.crop_cache import cache_roots

if TYPE_CHECKING:
    from lorat.data.shards.frame_index import FrameIndex
    from lorat_platform.search.trial.progress import TrialSetup

FOLDER = "latencies"
"""Where a search's folder keeps what was measured, a file per architecture."""
REFERENCE = {"small": "T-112", "brief": "T-112", "paper": "S-224"}
"""Variant of the reference network, by the recipe of the search's base configuration."""
FRAMES = 12
"""Most frames of one sequence, which are taken again and again."""
WARM_UP = 3
"""Frames of each network that are not counted."""
TURNS = 30, 400
"""Fewest and most frames of each network that are counted."""
PRECISION = 0.01
"""Relative standard error of the median ratio at which it is taken."""
LONGEST_S = 10.0
"""Time after which the fewest turns are enough, where latency is an objective."""
QUICK_S = 1.0
"""The same where it is only shown."""
ENOUGH_CALM = 10
"""Undisturbed turns from which on those that were disturbed are left out."""
PATIENCE_S = 120.0
"""Longest wait for other measurements on this node."""

Step = Callable[[], float]
"""Track one frame and return the seconds that it took."""


def latency_ms(tracker: Tracker, index: FrameIndex, setup: TrialSetup) -> float:
    """Return the milliseconds per frame of one target alone, decoding not counted.

    Measures where no trial of the search has a network of that architecture measured yet, alone
    among all measurements of this user on the node.

    Args:
        tracker: with the network.
        index: a validation set, for its frames.
        setup: of the search.

    Raises:
        UserError: if no sequence has two frames that can be read.
    """
    folder = storage.locate(setup.folder).child(FOLDER)
    name = f"{architecture(tracker)}.json"
    with _alone():
        if not folder.exists(name):
            folder.make()
            network = LoRAT(get_variant(REFERENCE[setup.space.base.model_variant.recipe]))
            reference = Tracker(network, device=tracker.device)
            longest_s = LONGEST_S if "latency" in setup.objectives else QUICK_S
            ratio, seconds = compare(*steps((tracker, reference), index), longest_s=longest_s)
            unit = _shared(folder, "reference.json", 1e3 * seconds)
            _shared(folder, name, ratio * unit)
    return _shared(folder, name)


def architecture(tracker: Tracker) -> str:
    """Name what decides how long a network takes: its layers, input sizes, numbers and device."""
    layers = [
        (name, list(tensor.shape), str(tensor.dtype))
        for name, tensor in tracker.model.state_dict().items()
    ]
    parts = [layers, repr(tracker.variant), str(tracker.dtype), tracker.device.type]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def steps(trackers: Sequence[SequenceTracker], index: FrameIndex) -> list[Step]:
    """Return what tracks a frame of the first usable sequence, for each tracker.

    Every frame is tracked from the sequence's first box, so that the time does not follow from
    where untrained weights have lost the target.

    Raises:
        UserError: if no sequence has two frames that can be read.
    """
    for track in usable_tracks(index):
        frames = _readable_frames(index, track)
        if len(frames) > 1:
            break
    else:
        raise UserError(
            f"No sequence of {index.uri} has two frames that can be read; check it with 'python "
            f"jobs/ingest.py verify {index.uri}'."
        )
    box = tuple(index.box[int(index.track_start[track])].tolist())
    return [_step_of(tracker, frames, box) for tracker in trackers]


def _readable_frames(index: FrameIndex, track: int) -> list[np.ndarray]:
    """Decode the first frames of a track, without those that are damaged."""
    reader = ImageReader(index)
    first, end = int(index.track_start[track]), int(index.track_start[track + 1])
    frames = []
    for row in range(first, min(end, first + FRAMES)):
        with contextlib.suppress(DamagedImage):
            frames.append(reader.decode(row))
    return frames


def _step_of(tracker: SequenceTracker, frames: list[np.ndarray], box: Any) -> Step:
    taken = 0

    def step() -> float:
        nonlocal taken
        targets = tracker.start(frames[:1], [box])
        frame = frames[1 + taken % (len(frames) - 1)]
        taken += 1
        began = time.perf_counter()
        tracker.step(targets, [frame])
        return time.perf_counter() - began

    return step


def compare(network: Step, reference: Step, *, longest_s: float = LONGEST_S) -> tuple[float, float]:
    """Let a network and a reference track frames in turns until their ratio is known.

    Args:
        network: what is measured.
        reference: what it is measured by.
        longest_s: time after which the fewest turns are enough.

    Returns:
        Seconds per frame of the network over those of the reference, the median of the turns; and
        those of the reference in its fastest turn.
    """
    for step in (network, reference):
        for _ in range(WARM_UP):
            step()
    ratios: list[float] = []
    calm: list[float] = []
    fastest = math.inf
    began = time.perf_counter()
    while len(ratios) < TURNS[1]:
        both = [0.0, 0.0]
        before = _times_interrupted()
        # Who begins changes, so that a load that grows or falls favours nobody.
        for which in (0, 1) if len(ratios) % 2 else (1, 0):
            both[which] = (network, reference)[which]()
        ratios.append(both[0] / both[1])
        if _times_interrupted() == before:
            calm.append(ratios[-1])
        fastest = min(fastest, both[1])
        if len(calm) >= TURNS[0] and _error(calm) < PRECISION:
            break
        if len(ratios) >= TURNS[0] and time.perf_counter() - began > longest_s:
            break
    return float(np.median(calm if len(calm) >= ENOUGH_CALM else ratios)), fastest


def _times_interrupted() -> int:
    """Return how often the kernel took a processor from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _error(ratios: list[float]) -> float:
    """Return the relative standard error of the median of numbers, from their median deviation."""
    median = float(np.median(ratios))
    deviation = 1.4826 * float(np.median(np.abs(np.array(ratios) - median)))
    return 1.2533 * deviation / math.sqrt(len(ratios)) / median


def _shared(folder: storage.Location, name: str, milliseconds: float | None = None) -> float:
    """Return what the first trial of the search measured, which may have been this one."""
    if milliseconds is not None and not folder.exists(name):
        folder.write_bytes(name, json.dumps({"ms": milliseconds}).encode())
    remedy = "delete it and resume the search"
    return float(read_json_at(folder, name, remedy, shape={"ms": float})["ms"])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep other measurements on this node waiting, where it has a place for a lock."""
    with contextlib.ExitStack() as held:
        for root in cache_roots()[:1]:
            with contextlib.suppress(OSError):  # not this user's: measured beside others
                root.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(open(root / "latency.lock", "a"))
                _wait_for(lock)
        yield


def _wait_for(lock: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
