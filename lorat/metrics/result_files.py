"""Result files as the analysis tools and the evaluation servers read them.

Three layouts: ``pytracking`` (a folder per tracker, tab-separated, with times), ``got10k`` (the
server's zip: a folder per sequence, runs numbered) and ``trackingnet`` (a flat zip).  Boxes are
xyxy inside and left, top, width, height in the files; pytracking's files of 1-based data sets
(LaSOT, VastTrack) are 1-based again.

The servers get boxes widened to whole pixels, as the LoRAT release submits them, except for the
given first box.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lorat.errors import UserError
from lorat.files.scratch import whole_file
from lorat.files.storage import check_plain_name
from lorat.image.boxes import RASTER_EPSILON, xywh_from_xyxy
from lorat.metrics.dialects import family

_PREFIXES = {"uav": "uav_", "nfs": "nfs_", "tc128": "tpl_", "tpl": "tpl_"}
_ONE_BASED = ("lasot", "vasttrack")
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def write_pytracking(
    folder: str | Path,
    boxes: Mapping[str, np.ndarray],
    *,
    dataset: str = "",
    seconds: Mapping[str, np.ndarray] | None = None,
) -> list[Path]:
    """Write ``SEQUENCE.txt`` and ``SEQUENCE_time.txt`` for the analysis of pytracking.

    Args:
        folder: of one tracker and parameter set, such as ``results/lorat/b224_000``; made.
        boxes: xyxy (n, 4) per sequence, 0-based.
        dataset: decides the prefix of the names (UAV123, NfS, TC128) and 1-based boxes.
        seconds: time per frame (n,).

    Returns:
        The files.

    Raises:
        UserError: if a sequence has a name that no file can have.
    """
    folder = Path(folder)
    _check_names(folder, boxes)
    folder.mkdir(parents=True, exist_ok=True)
    offset = 1.0 if family(dataset) in _ONE_BASED else 0.0
    written = []
    for name, xyxy in boxes.items():
        stem = pytracking_name(name, dataset)
        path = folder / f"{stem}.txt"
        path.write_text(_rows(xywh_from_xyxy(xyxy + offset), "%.3f", "\t"))
        written.append(path)
        if seconds is not None and name in seconds:
            path = folder / f"{stem}_time.txt"
            path.write_text(_rows(np.reshape(seconds[name], (-1, 1)), "%f", "\t"))
            written.append(path)
    return written


def pytracking_name(sequence: str, dataset: str) -> str:
    """Return a sequence's name in pytracking: UAV123's ``bike1`` is ``uav_bike1``."""
    prefix = _PREFIXES.get(family(dataset), "")
    return sequence if prefix and sequence.startswith(prefix) else prefix + sequence


def write_got10k(
    path: str | Path,
    runs: Iterable[Mapping[str, np.ndarray]],
    *,
    tracker: str = "LoRAT",
    seconds: Iterable[Mapping[str, np.ndarray]] | None = None,
) -> Path:
    """Write GOT-10k results: ``TRACKER/SEQUENCE/SEQUENCE_001.txt`` and ``SEQUENCE_time.txt``.

    Args:
        path: a ``.zip`` for the server, otherwise a folder for the toolkit.
        runs: boxes xyxy (n, 4) per sequence, for each repetition; one for a deterministic tracker.
        tracker: folder name in the archive.
        seconds: time per frame (n,) of each run, extra runs as extra columns.

    Raises:
        UserError: if the runs do not have the same sequences, or one has a name that no file can
            have.
    """
    all_runs = list(runs)
    _check_runs(all_runs)
    _check_names(path, [tracker, *all_runs[0]])
    all_seconds = None if seconds is None else list(seconds)
    files = {}
    for name in sorted(all_runs[0]):
        for number, run in enumerate(all_runs, start=1):
            rows = _rows(xywh_from_xyxy(whole_pixels(run[name])), "%.4f", ",")
            files[f"{tracker}/{name}/{name}_{number:03d}.txt"] = rows
        if all_seconds is not None:
            columns = np.stack([np.asarray(run[name], float) for run in all_seconds], axis=1)
            files[f"{tracker}/{name}/{name}_time.txt"] = _rows(columns, "%.8f", ",")
    return _write(Path(path), files)


def write_trackingnet(path: str | Path, boxes: Mapping[str, np.ndarray]) -> Path:
    """Write TrackingNet results: ``SEQUENCE.txt`` at the root of a zip (or in a folder).

    Args:
        path: a ``.zip`` for the server, otherwise a folder.
        boxes: xyxy (n, 4) per sequence; the server wants all 511 of the test set.

    Raises:
        UserError: if a sequence has a name that no file can have.
    """
    _check_names(path, boxes)
    files = {
        f"{name}.txt": _rows(xywh_from_xyxy(whole_pixels(boxes[name])), "%.2f", ",")
        for name in sorted(boxes)
    }
    return _write(Path(path), files)


def whole_pixels(boxes: np.ndarray) -> np.ndarray:
    """Widen boxes (n, 4) xyxy to the whole pixels that they touch; the first stays as given."""
    boxes = np.asarray(boxes, dtype=np.float64)
    wide = np.floor(boxes)
    wide[:, 2:] = np.floor(boxes[:, 2:] + 1 - RASTER_EPSILON)
    wide[:1] = boxes[:1]
    return wide


def _check_names(path: str | Path, names: Iterable[str]) -> None:
    for name in names:
        check_plain_name(name, f"the results for {path}")


def _check_runs(runs: list[Mapping[str, np.ndarray]]) -> None:
    if not runs or not runs[0]:
        raise UserError("There are no results to write; give at least one run of one sequence.")
    for number, run in enumerate(runs[1:], start=2):
        differing = sorted(set(run) ^ set(runs[0]))
        if differing:
            raise UserError(
                f"Run {number} has other sequences than run 1 ({', '.join(differing[:5])}); "
                "give the same sequences in every run."
            )


def _rows(values: np.ndarray, form: str, separator: str) -> str:
    return "".join(separator.join(form % v for v in row) + "\n" for row in values.tolist())


def _write(path: Path, files: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                # A fixed date: the same results give the same bytes.
                entry = zipfile.ZipInfo(name, _ZIP_TIME)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, text)
    else:
        for name, text in files.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return path


def box_files(video: Path) -> tuple[Path, Path]:
    """Return the CSV and the JSON file with the boxes that belong to an annotated video."""
    return video.with_suffix(".csv"), video.with_suffix(".json")


def write_boxes(
    video: Path,
    boxes: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    times_s: Sequence[float],
    about: Mapping[str, object],
) -> None:
    """Write the boxes of one object or several as CSV and JSON beside a video.

    The CSV has the columns frame, x, y, w, h, score and time_s.  Of several objects each has its
    own, ``x_1`` to ``score_1`` and so on, empty in the frames before it began, and the JSON has
    ``objects`` with the number of the first frame of each.

    Args:
        video: names the files.
        boxes: xyxy (k, 4) in pixels of each frame; NaN of objects that have not begun.
        scores: (k,) of each frame, 0 to 1.
        times_s: seconds since the first frame at which each is shown.
        about: more of what the JSON says.
    """
    xywh, score = xywh_from_xyxy(np.array(boxes)), np.array(scores)
    num = xywh.shape[1]
    table, content = box_files(video)
    with whole_file(table) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file)
        ends = [f"_{number}" for number in range(1, num + 1)] if num > 1 else [""]
        columns = [f"{name}{end}" for end in ends for name in ("x", "y", "w", "h", "score")]
        writer.writerow(["frame", *columns, "time_s"])
        for frame, time_s in enumerate(times_s):
            cells: list[str] = []
            for row, value in zip(xywh[frame], score[frame], strict=True):
                known = np.isfinite(row).all()
                cells += [*(f"{v:.3f}" for v in row), f"{value:.4f}"] if known else [""] * 5
            writer.writerow([frame, *cells, f"{time_s:.3f}"])
    objects = []
    for k in range(num):
        begin = int(np.argmax(np.isfinite(xywh[:, k]).all(axis=1)))
        known = np.isfinite(xywh[begin, k]).all()
        rows = slice(begin, len(xywh) if known else begin)
        objects.append(
            {
                "boxes_xywh": np.round(xywh[rows, k], 3).tolist(),
                "scores": np.round(score[rows, k], 4).tolist(),
            }
            | ({"first_frame": begin if known else None} if num > 1 else {})
        )
    found = objects[0] if num == 1 else {"objects": objects}
    times = {"times_s": np.round(times_s, 3).tolist()}
    with whole_file(content) as part:
        part.write_text(json.dumps({**about, **found, **times}) + "\n")
