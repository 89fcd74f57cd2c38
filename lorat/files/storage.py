"""Where datasets live: local folders and object stores behind one small interface.

A URI is a local path, ``file://``, ``s3://bucket/path`` or ``gs://bucket/path``.  Options of
``pyarrow.fs`` may follow as a query, for example
``s3://bucket/set?endpoint_override=http://127.0.0.1:9000&scheme=http``.
"""

from __future__ import annotations

import contextlib
import os
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from lorat.errors import UserError, named, without_surrogates
from lorat.files.addresses import refuse_secrets
from lorat.files.home import home
from lorat.files.scratch import make_file, marked, remove, sweep

_LOCAL = pafs.LocalFileSystem()
_NOT_IN_A_NAME = re.compile("[/\\\\\\x00-\\x1f\\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Location:
    """A folder on a file system of ``pyarrow.fs``."""

    uri: str
    filesystem: pafs.FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        """Whether the folder can be opened and mapped with the operating system's own calls."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def file(self, name: str) -> str:
        """Return the file system's path of a file in the folder, ``a/b`` in a folder of it.

        Raises:
            UserError: if the name leads out of the folder.
        """
        for part in name.split("/"):
            check_plain_name(part, f"the address {self.uri}")
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        """Tell whether a file or folder of that name is there."""
        return self.filesystem.get_file_info(self.file(name)).type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """List the files directly in the folder, sorted; none if the folder is not there."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.File)

    def folders(self) -> list[str]:
        """List the folders directly in the folder, sorted; none if the folder is not there."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)

    def child(self, name: str) -> Location:
        """Return the location of a folder inside this one."""
        return Location(join(self.uri, name), self.filesystem, self.file(name))

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file."""
        with self.filesystem.open_input_stream(self.file(name)) as stream:
            return stream.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a whole file so that no reader ever sees a part of it."""
        part = make_file(".part-", Path(self.path) if self.is_local else scratch_folder(self))
        try:
            part.write_bytes(data)
            publish(part, self, name)
        finally:
            part.unlink(missing_ok=True)

    def make(self) -> None:
        """Create the folder (object stores need none).

        Raises:
            UserError: if it cannot be created.
        """
        if self.is_local:
            try:
                os.makedirs(self.path, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"Cannot create the folder {self.path}: {error.strerror}; "
                    "give a folder that can be written."
                ) from error

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.file(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder directly in this one and what is in it, if it is there.

        On a file system it is out of view before anything of it is gone.

        Raises:
            UserError: if the name is that of another place.
        """
        check_plain_name(name, f"the address {self.uri}")
        if self.is_local:
            gone = marked(".deleted-", Path(self.path))
            if os.path.lexists(self.file(name)):
                os.rename(self.file(name), gone)
                remove(gone)
        else:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_dir(self.file(name))


def is_plain_name(name: str) -> bool:
    """Tell whether a name is that of one file or folder: no separators or control characters."""
    return name not in ("", ".", "..") and not _NOT_IN_A_NAME.search(name)


def check_plain_name(name: str, where: str) -> None:
    """Refuse a name, found in somebody's file, that cannot be one of a file or folder.

    Raises:
        UserError: for an empty name, ``.``, ``..``, separators and control characters.
    """
    if not is_plain_name(name):
        raise UserError(
            f"The name {name!r} in {where} cannot be that of a file (it has a separator or a "
            "control character, or leads elsewhere); use data from a source that you trust."
        )


@contextlib.contextmanager
def writing_to(location: Location) -> Iterator[None]:
    """Turn the failure of a file system or object store into a user's error.

    Raises:
        UserError: for a full disk, a bucket that is not there, missing rights and the like.
    """
    try:
        yield
    except OSError as error:
        # PyArrow writes what it did before what the system said.
        said = re.sub(r"^.*\[errno \d+\] ", "", str(error.strerror or error))
        lines = said.strip().splitlines()
        raise UserError(
            f"Cannot write to {location.uri}: {lines[0][:300] if lines else type(error).__name__}; "
            "make room there or give another place, then run the same command again."
        ) from error


def locate(uri: str | os.PathLike[str]) -> Location:
    """Resolve a URI.

    Raises:
        UserError: if it has a secret in it, the scheme is unknown, the store refuses it, or a
            local path is no text.
    """
    text = os.fspath(uri)
    refuse_secrets(text, "The address")
    scheme = urllib.parse.urlsplit(text).scheme if "://" in text else ""
    if scheme in ("", "file"):
        path = urllib.parse.unquote(text.removeprefix("file://")) if scheme else text
        path = os.path.abspath(os.path.expanduser(path))
        if path != without_surrogates(path):
            raise UserError(
                f"The name {named(path)} has bytes that are no text, which PyArrow cannot open; "
                "rename it, or give a link to it."
            )
        return Location(path, _LOCAL, path)
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except (ValueError, OSError) as error:
        raise UserError(
            f"Cannot use the address {text}: {error}; give a local folder, s3://BUCKET/PATH or "
            "gs://BUCKET/PATH."
        ) from error
    return Location(text, filesystem, path.rstrip("/"))


def join(uri: str, name: str) -> str:
    """Append a name to the path of a URI, before its query."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def cache_folder() -> Path:
    """Return the folder for what can be made again, ``datasets`` of the home folder."""
    return home() / "datasets"


def upload_folder() -> Path:
    """Return the folder for what is on its way to an object store."""
    return cache_folder() / "upload"


def scratch_folder(location: Location) -> Path:
    """Return a local folder from which a finished file can be published to ``location``.

    What killed processes of this machine were writing there is removed.
    """
    folder = Path(location.path) if location.is_local else upload_folder()
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    return folder


def publish(file: Path, location: Location, name: str) -> None:
    """Move a finished local file to its place: by renaming, or by one upload.

    An upload is one call without Python in between: a stream that an exception closes half-way,
    such as that of a termination signal, would put what it has so far in view.
    """
    if location.is_local:
        os.replace(file, location.file(name))
        return
    pafs.copy_files(
        str(file),
        location.file(name),
        source_filesystem=_LOCAL,
        destination_filesystem=location.filesystem,
        chunk_size=1 << 22,
        use_threads=False,
    )
    file.unlink()
