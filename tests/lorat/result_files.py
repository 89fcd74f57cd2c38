"""Reading result files back, as the analysis tools and the servers do."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from lorat.image.boxes import xyxy_from_xywh

ONE_BASED = ("LaSOT", "VastTrack")
PREFIXES = {"UAV123": "uav_", "nfs": "nfs_", "TC128": "tpl_"}


def read_pytracking(
    folder: Path, *, dataset: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return boxes (n, 4) xyxy, 0-based, and seconds (n,) by sequence."""
    boxes, seconds = {}, {}
    for path in folder.glob("*.txt"):
        name = path.stem.removeprefix(PREFIXES.get(dataset, ""))
        if name.endswith("_time"):
            seconds[name.removesuffix("_time")] = _table(path.read_text())[:, 0]
        else:
            boxes[name] = xyxy_from_xywh(_table(path.read_text())) - float(dataset in ONE_BASED)
    return boxes, seconds


def read_got10k(
    path: Path, tracker: str = "LoRAT"
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return boxes xyxy by sequence for each run, and times (n, runs)."""
    runs: list[dict[str, np.ndarray]] = []
    seconds = {}
    for name, text in sorted(_read(path).items()):
        folder, sequence, file = name.split("/")
        assert folder == tracker
        suffix = file.removeprefix(f"{sequence}_").removesuffix(".txt")
        if suffix == "time":
            seconds[sequence] = _table(text)
        else:
            runs += [{} for _ in range(int(suffix) - len(runs))]
            runs[int(suffix) - 1][sequence] = xyxy_from_xywh(_table(text))
    return runs, seconds


def read_trackingnet(path: Path) -> dict[str, np.ndarray]:
    """Return boxes xyxy (n, 4) by sequence, of a flat or nested archive."""
    return {
        Path(name).stem: xyxy_from_xywh(_table(text))
        for name, text in _read(path).items()
        if "__MACOSX" not in name
    }


def _table(text: str) -> np.ndarray:
    return np.loadtxt(io.StringIO(text.replace(",", " ")), ndmin=2)


def _read(path: Path) -> dict[str, str]:
    """Return the text files of a zip or folder by their relative names."""
    if path.is_dir():
        return {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*.txt")}
    with zipfile.ZipFile(path) as archive:
        return {n: archive.read(n).decode() for n in archive.namelist() if n.endswith(".txt")}
