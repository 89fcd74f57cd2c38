"""The manifest of a dataset: which shards it has, and how they were made."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from lorat.config.bounds import Count
from lorat.config.json_files import check_shape, parse_json
from lorat.errors import UserError, cannot_read
from lorat.files import storage

if TYPE_CHECKING:
    from lorat.data.shards.windows import WindowLaw


def dataset_info(*, name: str, split: str, law: WindowLaw | None) -> dict[str, Any]:
    """Return what the manifest and every shard say of the dataset."""
    info: dict[str, Any] = {"name": name, "split": split, "storage": "window" if law else "full"}
    return info | {"window": law.to_dict() if law else ""}


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.parquet"


SCHEMA_VERSION = 1


MANIFEST = "dataset.json"


WORK_FOLDER = "_ingest"
"""Folder of an unfinished ingest, removed when the dataset is whole."""


Storage = Literal["window", "full"]


_FILES = ("frames.arrow", "tracks.arrow", "valid.arrow")


_FOLDER_NAME = re.compile(r"index-[0-9A-Za-z_-]+")


_SHARD_NAME = re.compile(r"shard-\d+\.parquet")


def read_manifest(location: storage.Location) -> dict[str, Any]:
    """Read ``dataset.json``.

    Raises:
        UserError: if it is missing, unreadable or of another schema version.
    """
    try:
        data = location.read_bytes(MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        if location.exists(WORK_FOLDER):
            raise UserError(
                f"The ingest into {location.uri} is not finished; run the same ingest command "
                "again, it continues where it stopped."
            ) from error
        raise UserError(
            f"There is no dataset at {location.uri} (no {MANIFEST}); make one with "
            "python jobs/ingest.py, or rebuild its index with reindex if shards are there."
        ) from error
    except PermissionError as error:
        raise cannot_read(location.uri, error) from error
    except OSError as error:
        raise UserError(f"Cannot read the dataset at {location.uri}: {error}.") from error
    where = f"{MANIFEST} at {location.uri}"
    remedy = f"rebuild it with: python jobs/ingest.py reindex {location.uri}"
    manifest = parse_json(data, where, remedy, shape={"schema_version": int})
    check_schema_version(manifest["schema_version"], location.uri)
    check_shape(manifest, where, remedy, _MANIFEST_SHAPE)
    if not _has_own_files(manifest):
        raise UserError(
            f"{MANIFEST} at {location.uri} names files that are not those of a dataset; rebuild it "
            f"with: python jobs/ingest.py reindex {location.uri}"
        )
    return manifest


def _has_own_files(manifest: dict[str, Any]) -> bool:
    """Tell whether the manifest names an index folder and shards, all of them in its folder."""
    return (
        _FOLDER_NAME.fullmatch(manifest["index"]["folder"]) is not None
        and set(manifest["index"]["bytes"]) == set(_FILES)
        and all(_SHARD_NAME.fullmatch(shard["file"]) for shard in manifest["shards"])
    )


def previous_manifest(location: storage.Location) -> dict[str, Any]:
    """Return what is legible of the manifest that a new one will replace, else nothing."""
    try:
        return read_manifest(location)
    except UserError:
        return {}


def check_schema_version(version: object, where: str) -> None:
    """Refuse a schema version that this code does not read.

    Raises:
        UserError: if ``version`` is not :data:`SCHEMA_VERSION`.
    """
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has shard schema version {version}, this program reads version "
            f"{SCHEMA_VERSION}; ingest the dataset again or use the matching program version."
        )


_MANIFEST_SHAPE: dict[str, Any] = {
    "name": str,
    "split": str,
    "storage": Storage,
    "fingerprint": str,
    "window": dict | str,
    "num_tracks": Count,
    "num_frames": Count,
    "shards": [{"file": str, "bytes": int, "rows": int, "checksums?": bool}],
    "index": {"folder": str, "bytes": dict[str, int]},
    "plan?": dict,
    "attributes?": dict[str, list[str]],
}
