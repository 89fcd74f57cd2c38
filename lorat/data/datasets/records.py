"""Records: what a dataset's files say of one track, and the datasets that are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lorat.data.datasets.findings import Findings
from lorat.data.datasets.text import read_names
from lorat.errors import UserError, named
from lorat.files.storage import is_plain_name


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

    def selected(
        self, entries: list[Entry], findings: Findings, where: Path | None = None
    ) -> list[Entry]:
        """Keep the entries of the include list, in the dataset's order, each name once.

        Names are looked at here, before anything is converted: shards, index and result files are
        made of them.

        Args:
            where: file or folder that the names come from; none means the dataset's folder.

        Raises:
            UserError: if the list is missing, names nothing that is there, or no name can be used.
        """
        entries = _usable_names(entries, where or self.source, findings)
        if self.include_list is None:
            return entries
        wanted = self.wanted(read_names(self.include_list), entries)
        present = {e.name for e in entries}
        for name in dict.fromkeys(wanted):
            if name not in present:
                findings.add(
                    named(name), "dropped", "named in the include list but not in the dataset"
                )
        chosen = set(wanted)
        kept = [e for e in entries if e.name in chosen]
        if not kept:
            raise UserError(
                f"No sequence of {self.label} is named in {named(self.include_list)} (it begins "
                f"with {wanted[0] if wanted else 'nothing'!r}; the dataset with "
                f"{entries[0].name!r})."
            )
        return kept

    def wanted(self, lines: list[str], entries: list[Entry]) -> list[str]:
        """Turn the lines of an include list into names."""
        return lines


def _usable_names(entries: list[Entry], where: Path, findings: Findings) -> list[Entry]:
    """Leave out what cannot be the name of a sequence, and what is named again.

    Raises:
        UserError: if nothing is left.
    """
    kept: dict[str, Entry] = {}
    for entry in entries:
        if not is_plain_name(entry.name):
            why = f"its name, from {named(where)}, is no UTF-8 or not that of one file; rename it"
            findings.add(named(entry.name), "dropped", why)
        elif entry.name in kept:
            again = entry.values == kept[entry.name].values
            why = f"named again in {named(where)}"
            why += "; taken once" if again else ", for something else; only the first is taken"
            findings.add(entry.name, "repaired" if again else "dropped", why)
        else:
            kept[entry.name] = entry
    if not kept:
        raise UserError(
            f"No name of a sequence in {named(where)} can be used, as "
            f"'{named(entries[0].name)}'; give names of one file or folder each, in UTF-8, without "
            "separators and control characters."
        )
    return list(kept.values())
