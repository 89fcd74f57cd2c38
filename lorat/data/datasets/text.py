"""Text files of datasets: lists of names, rows of numbers and flags, as many hands write them.

Encodings with a byte-order mark (UTF-8, UTF-16) and all three kinds of line ends are read.  A row
is split by one kind of separator (semicolons, else commas, else white space), so a decimal comma or
a point written ``x,y`` among spaces makes no row of another meaning.  Only decimal digits with a
point and an exponent are numbers.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.errors import UserError, cannot_read, named

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_NO_NUMBER = frozenset({"nan", "none", "null", "na", "n/a"})
"""Words by which a row says that there is no box."""
_LEFT = re.compile(r"(^|[_.])(x|left|min_?x)")
"""Names of the column that a box begins with: x, x1, xmin, left, bb_left, bbox_x, ..."""
_RIGHT = re.compile(r"(^|[_.])(x_?2|x_?max|max_?x|x_?br|right)")
_WIDTH = re.compile(r"(^|[_.])w")
_DECIMAL_COMMA = re.compile(r"[0-9],[0-9]+(;|[ \t]+[-+0-9])")
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file without white space around them; empty ones at the end go.

    Raises:
        UserError: if it cannot be read, or is no text.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise cannot_read(named(file), error) from error
    encoding = next((e for mark, e in _MARKS.items() if data.startswith(mark)), "utf-8")
    text = data.decode(encoding, errors="replace")
    if "\0" in text:
        raise UserError(f"{named(file)} is no text (it has zero bytes); save it as UTF-8.")
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_names(file: Path) -> list[str]:
    """Read a list of sequences, one per line; a slash behind a name, as of a folder, is none.

    Raises:
        UserError: if it cannot be read, or is no text.
    """
    return [name for line in read_lines(file) if (name := line.removeprefix("./").rstrip("/"))]


def read_rows(
    file: Path,
    num_columns: int,
    sequence: str,
    findings: Findings,
    *,
    num_images: int | None = None,
    corners: bool = False,
    other_columns: bool = False,
) -> np.ndarray:
    """Read rows of numbers, one per frame.

    A row that is no ``num_columns`` numbers becomes NaN, keeps its frame's place and is reported.
    A first line that names the columns is no row, lines that begin with # are none, and empty
    lines between rows hold places only if there are as many images as lines.

    Args:
        num_images: images of the sequence; none means that nobody knows yet.
        corners: a box is left, top, right, bottom; otherwise left, top, width, height.
        other_columns: where the first line names the columns, a column with the number of the frame
            may stand before the box and others behind it; they are left out.

    Returns:
        float64 (n, num_columns).

    Raises:
        UserError: if the file cannot be read, its columns are others, or nothing tells which row
            belongs to which frame.
    """
    lines = read_lines(file)
    names = _column_names(lines[0]) if lines else []
    left_out = 0
    if names:
        left_out = int(names[0].startswith("frame") and len(names) > num_columns and other_columns)
        _check_columns(file, names, left_out, num_columns, corners, other_columns)
        del lines[0]
        findings.add(sequence, "repaired", f"{file.name}: the first line names columns, not a box")
    if any(line.startswith("#") for line in lines):
        lines = [line for line in lines if not line.startswith("#")]
        findings.add(sequence, "repaired", f"{file.name}: lines that begin with # are no rows")
    lines = _without_gaps(file, lines, num_images, sequence, findings)
    rows, unreadable, odd_lengths = [], [], []
    for number, line in enumerate(lines, start=1):
        fields = split_fields(line)[left_out:]
        if names and other_columns:
            fields = fields[:num_columns]
        values = [read_number(field) for field in fields]
        if len(values) != num_columns and line:
            odd_lengths.append(number)
        elif None in values:
            unreadable.append(number)
        whole = len(values) == num_columns and all(v is not None for v in values)
        rows.append(values if whole else [math.nan] * num_columns)
    wrong = odd_lengths or unreadable
    if 2 * len(odd_lengths + unreadable) > len(lines) or (other_columns and odd_lengths):
        raise _other_rows(file, lines[wrong[0] - 1], wrong[0], num_columns, other_columns)
    for numbers, action, what in (
        (odd_lengths, "dropped", f"has another number of values than {num_columns}"),
        (unreadable, "repaired", f"is no {num_columns} numbers"),
    ):
        if numbers:
            why = f"{file.name}: row {what}, taken as no box"
            findings.add(sequence, action, why, numbers)  # type: ignore[arg-type]
    box = np.array(rows, np.float64).reshape(-1, num_columns)
    box[np.isnan(box).any(axis=1)] = math.nan
    return box


def split_fields(line: str) -> list[str]:
    """Split a row by its one kind of separator; one more at its end, and quotes, are left out."""
    separator = next((s for s in ";," if s in line), None)
    if separator is None:
        return line.split()
    fields = [field.strip().strip("\"'") for field in line.split(separator)]
    return fields[:-1] if len(fields) > 1 and not fields[-1] else fields


def read_number(field: str) -> float | None:
    """Return a finite number, NaN for a word that says there is none, and none for all else."""
    if field.lower() in _NO_NUMBER:
        return math.nan
    if not _NUMBER.fullmatch(field):
        return None
    value = float(field)
    return value if math.isfinite(value) else None


def _column_names(line: str) -> list[str]:
    """Return the words of a line that has letters and no number, in lower case, else nothing."""
    words = [w.strip().lower() for w in split_fields(line.lstrip("#").strip()) if w.strip()]
    if any(read_number(word) is not None for word in words):
        return []
    if line.startswith("#") and not (words and _LEFT.search(words[words[0].startswith("frame")])):
        return []
    return words if any(character.isalpha() for word in words for character in word) else []


def _check_columns(
    file: Path,
    names: Sequence[str],
    left_out: int,
    num_columns: int,
    corners: bool,
    other_columns: bool,
) -> None:
    box = names[left_out:]
    box_names = "left, top, right, bottom" if corners else "left, top, width, height"
    if other_columns and len(box) > num_columns:
        box = box[:num_columns]
    fits = len(box) == num_columns and bool(_LEFT.search(box[0]))
    fits = fits and not (_WIDTH if corners else _RIGHT).search(box[2])
    if not fits:
        raise UserError(
            f"The first line of {named(file)} is {', '.join(names)}; allowed are the numbers of a "
            f"box or the names of its columns ({box_names}), beginning with x or left"
            + (", after a column frame if there is one: put the others behind the box"
               if other_columns else "")
            + "; correct or leave out that line."
        )  # fmt: skip


def _without_gaps(
    file: Path, lines: list[str], num_images: int | None, sequence: str, findings: Findings
) -> list[str]:
    """Leave empty lines out where they hold no frame's place.

    Raises:
        UserError: where the number of images does not tell.
    """
    num_empty = sum(1 for line in lines if not line)
    if not num_empty or num_images == len(lines):
        return lines
    if num_images == len(lines) - num_empty:
        findings.add(sequence, "repaired", f"{file.name}: {num_empty} empty lines are no rows")
        return [line for line in lines if line]
    images = "" if num_images is None else f" and there are {num_images} images"
    raise UserError(
        f"{named(file)} has {num_empty} empty lines among {len(lines)}{images}, which leaves open "
        "what frames the rows after them belong to; write one row per frame, of NaN where there "
        "is no box."
    )


def _other_rows(
    file: Path, line: str, number: int, num_columns: int, other_columns: bool
) -> UserError:
    """Make the error for a file whose rows are something else than boxes."""
    fields = split_fields(line)
    remedy = "leave the others out"
    if _DECIMAL_COMMA.search(line):
        remedy = "write numbers with a decimal point, and points without a comma inside"
    elif len(fields) <= num_columns:
        remedy = "write numbers alone, with a decimal point"
    elif other_columns:
        remedy += (
            ", or name the columns in the first line (a column frame before the box is left out, "
            "and so is what follows it)"
        )
    return UserError(
        f"Line {number} of {named(file)} has {len(fields)} values ({named(line[:60])}), allowed "
        f"are the {num_columns} numbers of a box; {remedy}."
    )


def read_flags(
    file: Path,
    count: int,
    sequence: str,
    findings: Findings,
    *,
    default: int,
    what: str = "frames",
) -> np.ndarray | None:
    """Read whole numbers, one per frame, on one line or many; none if there is no such file.

    Too few are filled with ``default``, too many are cut, and both are reported.
    """
    if not file.is_file():
        return None
    fields = [f for f in re.split(r"[,;\s]+", " ".join(read_lines(file))) if f]
    if fields and fields[0].isalpha():
        del fields[0]
        findings.add(sequence, "repaired", f"{file.name}: the first word is a name, not a flag")
    if not all(re.fullmatch(r"[+-]?[0-9]{1,9}(\.0*)?", field) for field in fields):
        findings.add(sequence, "repaired", f"{file.name} cannot be read and is ignored")
        return None
    values = [int(float(field)) for field in fields]
    if len(values) != count:
        why = f"{file.name} has {len(values)} values for {count} {what}"
        findings.add(sequence, "repaired", why)
    return np.array((values + [default] * count)[:count], np.int64)
