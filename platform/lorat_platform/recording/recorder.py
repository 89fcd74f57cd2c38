"""What a run can be told, whichever process keeps its journal."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorat.errors import without_surrogates

log = logging.getLogger(__name__)


class Recorder(ABC):
    """What a run can be told; values are checked and made plain here."""

    @abstractmethod
    def _record(self, op: str, **fields: Any) -> None: ...

    @abstractmethod
    def _store(self, source: Path | bytes, name: str, folder: str) -> None: ...

    def in_flight(self) -> list[Any]:
        """Return Ray's references of the records on their way to the process that journals them."""
        return []

    def log_metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Record numbers at a step; NaN and infinities are kept and marked, never refused."""
        plain: dict[str, float] = {}
        for name, value in values.items():
            try:
                plain[_valid_name(name)] = float(value)
            except (TypeError, ValueError):
                log.warning("The metric %s is %r, which is no number: left out.", name, value)
        if plain:
            self._record("metrics", values=plain, step=int(step))

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; nested ones become dotted names, long ones go to an artefact too."""
        flat = {_valid_name(k): _text(v) for k, v in flatten(values).items()}
        if flat:
            self._record("params", values=flat)

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        if values:
            self._record("tags", values={_valid_name(k): _text(v) for k, v in values.items()})

    def log_inputs(self, datasets: Sequence[dict[str, str]]) -> None:
        """Record which data sets the run reads; the same again changes nothing.

        Args:
            datasets: what :func:`~lorat_platform.recording.inputs.dataset_inputs` gave.
        """
        if datasets:
            self._record("inputs", datasets=list(datasets))

    def share_view(self, key: str, view: Mapping[str, Any]) -> None:
        """Give the run's experiment a view of its runs.

        Args:
            key: names the view in its address.
            view: what :func:`~lorat_platform.recording.pages.table_view` gave.
        """
        self._record("view", key=key, view=json.dumps(view))

    def log_console(self, text: str) -> None:
        """Append text to the run's console log, an artefact that grows with the run."""
        if text:
            self._record("console", text=without_surrogates(text))

    def set_description(self, markdown: str) -> None:
        """Set what the run's page shows at its top."""
        self.set_tags({"mlflow.note.content": markdown})

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a copy of a file or folder, placed under ``folder`` of the run's artefacts.

        Links in it are left out, so that nothing is uploaded that lies elsewhere.
        """
        path = Path(path)
        self._store(path, path.name, folder)

    def log_bytes(self, data: bytes, name: str) -> None:
        """Record an artefact from memory; ``name`` may hold folders, as in ``plots/a.png``."""
        folder, _, name = name.rpartition("/")
        self._store(data, name, folder)


def regular_files(source: Path) -> Iterator[tuple[Path, Path]]:
    """List a file, or the regular files of a folder, each with its path relative to the source.

    Links, pipes and the like are left out, which is said.

    Raises:
        OSError: if the source itself cannot be read, or is neither a file nor a folder.
    """
    mode = source.lstat().st_mode
    if stat.S_ISREG(mode):
        yield source, Path()
        return
    if not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a link or special file is not uploaded", str(source))
    left_out = []
    for folder, folders, files in os.walk(source):
        left_out += [path for name in folders if (path := Path(folder, name)).is_symlink()]
        for name in sorted(files):
            path = Path(folder, name)
            if stat.S_ISREG(path.lstat().st_mode):
                yield path, path.relative_to(source)
            else:
                left_out.append(path)
    if left_out:
        log.warning(
            "%d links or special files of %s are not uploaded, the first one %s.",
            len(left_out), source, left_out[0].relative_to(source),
        )  # fmt: skip


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _valid_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", str(name), flags=re.ASCII)[:250]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, default=str)
    return without_surrogates(str(value))
