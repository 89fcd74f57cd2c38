"""Records: what a dataset's files say of one track, and what was wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from lorat.errors import UserError

Action = Literal["kept", "repaired", "dropped"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One anomaly: where, what was done, and why."""

    sequence: str
    """Name of the sequence; empty if it concerns the whole dataset."""
    action: Action
    why: str
    frames: tuple[int, ...] = ()
    """Numbers of the frames concerned; empty means the sequence as a whole."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"frames": list(self.frames)}


class Findings:
    """Anomalies in the order they were met; frames of one kind are gathered in one finding."""

    def __init__(self, findings: Iterable[Finding] = ()):
        self._frames: dict[tuple[str, Action, str], list[int]] = {}
        for finding in findings:
            self.add(finding.sequence, finding.action, finding.why, finding.frames)

    def add(self, sequence: str, action: Action, why: str, frames: Iterable[int] = ()) -> None:
        """Note an anomaly."""
        self._frames.setdefault((sequence, action, why), []).extend(int(f) for f in frames)

    def __iter__(self) -> Iterator[Finding]:
        for (sequence, action, why), frames in self._frames.items():
            yield Finding(sequence=sequence, action=action, why=why, frames=tuple(frames))

    def __len__(self) -> int:
        return len(self._frames)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The frames of one target.

    Attributes:
        images: file of each frame, empty where it is missing; of a video, the video's file once.
        is_video: ``images`` is one video whose frames have the numbers ``frame_number``.
        frame_number: int (n), ascending.
        box: float64 (n, 4), xyxy, 0-based pixels, NaN where none is annotated.
        visible: bool (n), neither absent nor fully occluded, as annotated.
        first_box_only: the boxes after the first are not published, so none is expected there.
        cover: int8 (n), GOT-10k's cover label, or none.
        attributes: what makes the sequence hard, as the dataset publishes it; for evaluation.
    """

    name: str
    category: str = ""
    images: tuple[str, ...]
    is_video: bool = False
    frame_number: np.ndarray
    box: np.ndarray
    visible: np.ndarray
    first_box_only: bool = False
    cover: np.ndarray | None = None
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What :meth:`RawDataset.load` needs to read some tracks; small, so that it travels."""

    name: str
    values: Any = None


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """A dataset on disk, as it was published."""

    source: Path
    """Folder of the dataset as published; every machine of the cluster must see it."""
    include_list: Path | None = None
    """File with one sequence name per line; only these are taken."""

    label: ClassVar[str]
    """Name of the dataset in the shards."""
    frames_hint: ClassVar[int] = 500
    """Usual number of frames of an entry, which decides how many go into a shard."""

    @property
    def split_name(self) -> str:
        """Name of the split in the shards."""
        return str(getattr(self, "split", "test"))

    @property
    def for_training(self) -> bool:
        """Whether the split is trained on: cleaned, and windowed unless asked otherwise."""
        return self.split_name == "train"

    def entries(self, findings: Findings) -> list[Entry]:
        """List what is there, in the dataset's own order.

        Raises:
            UserError: if the folder does not have the dataset's layout.
        """
        raise NotImplementedError

    def load(self, entry: Entry, findings: Findings) -> list[Recording]:
        """Read the annotations of an entry; images are only named, not read."""
        raise NotImplementedError

    def folder(self) -> Path:
        """Return the folder of the dataset.

        Raises:
            UserError: if it is missing.
        """
        if not self.source.is_dir():
            raise UserError(
                f"There is no folder {self.source}; give --source the dataset's folder."
            )
        return self.source

    def wrong_layout(self, expected: str, folder: Path) -> UserError:
        """Make the error for a folder that is not the named dataset."""
        names = (
            sorted(p.name + "/" * p.is_dir() for p in folder.iterdir()) if folder.is_dir() else []
        )
        found = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        found = found or ("nothing" if folder.is_dir() else "no such folder")
        return UserError(
            f"{folder} does not have the layout of {self.label}: expected {expected}; "
            f"found {found}."
        )

    def selected(self, entries: list[Entry], findings: Findings) -> list[Entry]:
        """Keep the entries of the include list, in the dataset's order.

        Raises:
            UserError: if the list is missing or names nothing that is there.
        """
        if self.include_list is None:
            return entries
        wanted = self.wanted(read_lines(self.include_list), entries)
        counts = Counter(e.name for e in entries)
        for name in wanted:
            if name not in counts:
                findings.add(name, "dropped", "named in the include list but not in the dataset")
        chosen = set(wanted)
        kept = [e for e in entries if e.name in chosen]
        if not kept:
            raise UserError(
                f"No sequence of {self.label} is named in {self.include_list} (it begins with "
                f"{wanted[0] if wanted else 'nothing'!r}; the dataset with {entries[0].name!r})."
            )
        return kept

    def wanted(self, lines: list[str], entries: list[Entry]) -> list[str]:
        """Turn the lines of an include list into names."""
        return lines


def read_lines(file: Path) -> list[str]:
    """Read the non-empty lines of a text file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}; check the path.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
