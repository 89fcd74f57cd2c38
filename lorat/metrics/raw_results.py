"""Raw result files, as other tools publish them: found, matched with sequences, and parsed.

The layouts are told by where the files lie: ``SEQUENCE.txt`` in a folder (pytracking, OTB, the
toolkits that imitate them) or a zip (TrackingNet), or ``SEQUENCE/SEQUENCE_001.txt`` (GOT-10k).
Nothing is corrected here; what is odd about a file is noted, and
:mod:`lorat.metrics.explanation` says what it does to the score.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from lorat.data.datasets.text import read_lines, read_number, split_fields
from lorat.errors import UserError, named
from lorat.files.scratch import temporary_folder
from lorat.image.boxes import xywh_from_xyxy, xyxy_from_xywh
from lorat.metrics.dialects import GroundTruth, family, first_pixel
from lorat.metrics.result_files import pytracking_name

PREFIX = "results:"
"""Begins the name of raw results where a model could stand."""
SUFFIXES = (".txt", ".csv")
"""Of result files; the toolkits read the first."""
NO_BOXES = re.compile(
    r"_(time|times|fps|scores?|confidences?|confidence_value|all_boxes|all_scores|object_presence"
    r"_scores?|max_scores?)$"
)
"""Ends of the names of files that hold something else than boxes."""
MAX_FILE_BYTES = 1 << 26
"""Of a result file; ten thousand frames need less than a megabyte.  Larger ones are left out."""
MAX_ZIP_BYTES = 1 << 32
"""Of all result files in a zip, unpacked."""
_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]+,[0-9]+")
_RUN = re.compile(r"_([0-9]{1,3})$")


@dataclass(frozen=True, kw_only=True)
class RawFile:
    """The rows of one result file."""

    path: str
    """Within the folder or zip."""
    rows: np.ndarray
    """float64 (m, 4) as written; NaN in rows that are no box."""
    is_empty: np.ndarray
    """bool (m,): the line is empty, so it may hold no frame's place."""
    separator: str
    """In words, such as ``tabs``."""
    decimals: int
    """Most digits after a point."""
    oddities: tuple[str, ...] = ()
    """What is odd about the text, in words."""

    def placed(self, num_frames: int) -> np.ndarray:
        """Return the rows, of which empty ones stay only where every line is then a frame's."""
        if len(self.rows) == num_frames:
            return self.rows
        return self.rows[~self.is_empty]


@dataclass(frozen=True, kw_only=True)
class RawResults:
    """The result files of one tracker on one data set."""

    folder: Path
    files: dict[str, RawFile]
    """By sequence of the data set."""
    other_names: dict[str, str]
    """Sequences whose files have another name than any layout gives them, with that name."""
    unknown: list[str]
    """Names of files that belong to no sequence."""
    several_runs: list[str]
    """Sequences of which other runs than the first are there."""
    unread: dict[str, RawFile]
    """Files that belong to no sequence by their names, by path."""

    def origin(self, truths: Mapping[str, GroundTruth], dataset: str) -> float:
        """Return the coordinate of the first pixel: 1 in 1-based files, else 0.

        Files begin with the given box, which tells; where they do not, the data set's custom does.
        """
        steps = []
        for name, file in self.files.items():
            if name in truths and len(file.rows):
                step = file.rows[0] - xywh_from_xyxy(truths[name].boxes[0])
                if np.isfinite(step).all() and np.abs(step[2:]).max() < 0.6:
                    steps.append(step[:2])
        if steps:
            middle = np.median(steps, axis=0)
            for origin in (0.0, 1.0):
                if np.abs(middle - origin).max() < 0.3:
                    return origin
        return first_pixel(dataset)

    def boxes(
        self, truths: Mapping[str, GroundTruth], dataset: str
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return boxes (n, 4) xyxy, 0-based, and why sequences have none."""
        origin = self.origin(truths, dataset)
        boxes, without = {}, {}
        for name, truth in truths.items():
            num = len(truth.boxes)
            if name not in self.files:
                without[name] = f"no file in {named(self.folder)}"
                continue
            file = self.files[name]
            rows = file.placed(num)
            if len(rows) != num:
                without[name] = f"{named(file.path)} has {len(rows)} rows for {num} frames"
                continue
            boxes[name] = xyxy_from_xywh(rows) - origin
        return boxes, without


def read_results(folder: str | Path, sequences: Sequence[str], dataset: str) -> RawResults:
    """Read the result files of a folder or zip.

    Args:
        folder: of one tracker, whatever lies between it and the files.
        sequences: names in the data set.
        dataset: its name; pytracking's files of UAV123, NfS and TC128 begin with a prefix.

    Raises:
        UserError: if there is nothing to read, or there are several results of a sequence.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise UserError(
            f"There is no {named(folder)}; give the folder or zip with a tracker's result files."
        )
    with _unpacked(folder) as place:
        paths = [
            path.relative_to(place)
            for path in sorted(place.rglob("*"))
            if path.suffix in SUFFIXES
            and not _is_other(path.relative_to(place))
            and path.is_file()
            and path.stat().st_size <= MAX_FILE_BYTES
        ]
        if not paths:
            raise UserError(
                f"{named(folder)} holds no result files; give the folder or zip with SEQUENCE.txt "
                "or SEQUENCE/SEQUENCE_001.txt of one tracker."
            )
        chosen, other_names, several, rest = _match(folder, paths, sequences, dataset)
        parsed = {path: parse_file(place / path, path.as_posix()) for path in paths}
    return RawResults(
        folder=folder,
        files={name: parsed[path] for name, path in chosen.items()},
        other_names=other_names,
        unknown=[path.as_posix() for path in rest],
        several_runs=several,
        unread={path.as_posix(): parsed[path] for path in rest},
    )


@contextmanager
def _unpacked(folder: Path) -> Iterator[Path]:
    """Yield a folder with the text files of a folder or zip."""
    if folder.is_dir():
        yield folder
        return
    try:
        with zipfile.ZipFile(folder) as archive, temporary_folder() as scratch:
            entries = [
                entry
                for entry in archive.infolist()
                if entry.filename.endswith(SUFFIXES) and entry.file_size <= MAX_FILE_BYTES
            ]
            if sum(entry.file_size for entry in entries) > MAX_ZIP_BYTES:
                raise UserError(
                    f"{named(folder)} unpacks to more than {MAX_ZIP_BYTES >> 30} GiB of text; give "
                    "the results of one tracker on one data set."
                )
            archive.extractall(scratch, entries)
            yield scratch
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"{named(folder)} is neither a folder nor a zip that can be read ({error}); give one."
        ) from error


def _is_other(path: PurePath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return hidden or bool(NO_BOXES.search(path.stem.lower()))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _match(
    folder: Path, paths: Sequence[Path], sequences: Sequence[str], dataset: str
) -> tuple[dict[str, Path], dict[str, str], list[str], list[Path]]:
    """Find the file of each sequence.

    Returns:
        Files by sequence, other names by sequence, sequences with several runs, and what is left.
    """
    usual = {name: name for name in sequences}
    usual |= {pytracking_name(name, dataset): name for name in sequences}
    loose: dict[str, set[str]] = {}
    for sequence in sequences:
        for form in (sequence, pytracking_name(sequence, dataset)):
            loose.setdefault(_plain(form), set()).add(sequence)
    found: dict[str, list[Path]] = {}
    spelled: dict[str, str] = {}
    rest = []
    for path in paths:
        base = _RUN.sub("", path.stem)
        in_own = path.parent.name == base and base != path.stem
        stem = base if in_own and path.stem not in usual else path.stem
        name: str | None = usual.get(stem)
        if name is None:
            kind = family(dataset)
            forms = (stem, base, re.sub(rf"^{kind}[-_]", "", stem, flags=re.IGNORECASE))
            close = {n for form in forms for n in loose.get(_plain(form), set())}
            if len(close) == 1:
                (name,) = close
                spelled[name] = stem
        if name is None:
            rest.append(path)
        else:
            found.setdefault(name, []).append(path)
    several = []
    for sequence, files in found.items():
        exact = [path for path in files if usual.get(path.stem, usual.get(_RUN.sub("", path.stem)))]
        if exact and len(exact) < len(files):
            rest += [path for path in files if path not in exact]
            found[sequence] = files = exact
        spelled = {k: v for k, v in spelled.items() if k != sequence or not exact}
        if len({path.parent for path in files}) > 1:
            places = ", ".join(named(path.parent) for path in files[:3])
            raise UserError(
                f"{named(folder)} holds several results of {sequence} (in {places}); give the "
                "folder of one tracker."
            )
        if len(files) > 1:
            several.append(sequence)
    return {name: files[0] for name, files in found.items()}, spelled, several, sorted(rest)


def parse_file(file: Path, path: str) -> RawFile:
    """Parse a result file, whatever it is like; one that cannot be read has no rows."""
    oddities: list[str] = []
    try:
        lines = read_lines(file)
    except UserError:
        lines = []
        oddities.append("no text, or not to be read")
    if lines and file.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff"):
        oddities.append("saved as UTF-16")
    if file.suffix != SUFFIXES[0]:
        oddities.append(f"named {file.suffix} in the place of {SUFFIXES[0]}")
    if any(line[:1] in ("[", "(") for line in lines):
        oddities.append("brackets around the rows")
        lines = [line.strip("[](), ") for line in lines]
    if lines and any(c.isalpha() for c in lines[0]) and not _numbers(lines[0])[0]:
        oddities.append("a header line")
        lines = lines[1:]
    values, separators, decimals, commas = [], Counter[str](), 0, False
    for line in lines:
        numbers, separator, comma = _numbers(line)
        values.append(numbers)
        commas |= comma
        if numbers:
            separators[separator] += 1
        digits = re.findall(r"\.([0-9]*)", line.replace(",", ".") if comma else line)
        decimals = max([decimals, *(len(d.rstrip("0")) for d in digits)])
    widths = Counter(len(numbers) for numbers in values if numbers)
    width = widths.most_common(1)[0][0] if widths else 4
    is_empty = np.array([not line for line in lines], dtype=bool)
    table = np.full((len(lines), max(width, 1)), math.nan)
    for row, numbers in enumerate(values):
        if len(numbers) == width:
            table[row] = numbers
    if len(widths) > 1:
        oddities.append("rows with other numbers of values")
    if commas:
        oddities.append("decimal commas")
    if is_empty.any():
        oddities.append(f"{int(is_empty.sum())} empty lines")
    rows, added = _box_columns(table)
    oddities += added
    separator = separators.most_common(1)[0][0] if separators else "nothing"
    return RawFile(
        path=path, rows=rows, is_empty=is_empty, separator=separator, decimals=decimals,
        oddities=tuple(oddities),
    )  # fmt: skip


def _numbers(line: str) -> tuple[list[float], str, bool]:
    """Return the numbers of a line, what separates them, and whether commas stand for points."""
    if not line:
        return [], "", False
    for fields in (line.split(";"), line.split()):
        fields = [field.strip() for field in fields if field.strip()]
        if len(fields) >= 4 and any(_DECIMAL_COMMA.fullmatch(field) for field in fields):
            numbers = [read_number(field.replace(",", ".")) for field in fields]
            if None not in numbers:
                return [n for n in numbers if n is not None], "semicolons or spaces", True
    fields = split_fields(line)
    separator = (
        "semicolons"
        if ";" in line
        else "commas"
        if "," in line
        else "tabs"
        if "\t" in line
        else "spaces"
    )
    if len(fields) < 4:  # none of the usual ones
        fields = [field for field in re.split(r"[^0-9A-Za-z.+-]+", line) if field]
        separator = "other signs"
    numbers = [_number(field) for field in fields]
    if len(numbers) < 4 or None in numbers:
        return [], "", False
    return [n for n in numbers if n is not None], separator, False


def _number(field: str) -> float | None:
    if re.fullmatch(r"[+-]?inf(inity)?", field.lower()):
        return math.nan
    return read_number(field)


def _box_columns(table: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Take the four columns of the box out of wider rows; say what the others are."""
    oddities = []
    if table.shape[1] > 4 and len(table) > 2:
        steps = np.diff(table[:, 0])
        if np.isfinite(steps).any() and (steps[np.isfinite(steps)] == 1).all():
            table = table[:, 1:]
            oddities.append("frame numbers in the first column")
    if table.shape[1] > 4 and len(table):
        score, others = table[:, 0], table[:, 1:]
        known = np.isfinite(table).all(axis=1)
        if known.any() and (np.abs(score[known]) <= 1).all() and (others[known] > 1.5).any():
            table = others
            oddities.append("scores in the first column")
    if table.shape[1] == 8:
        corners = table.reshape(-1, 4, 2)
        low, high = corners.min(axis=1), corners.max(axis=1)
        return np.concatenate([low, high - low], axis=1), [*oddities, "polygons of four corners"]
    if table.shape[1] > 4:
        oddities.append(f"{table.shape[1] - 4} more columns")
    if table.shape[1] < 4:
        return np.full((len(table), 4), math.nan), [*oddities, "rows of fewer than 4 values"]
    return table[:, :4], oddities
