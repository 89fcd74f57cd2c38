"""What is written to an object store is in view as a whole or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorat.errors import UserError
from lorat.files import storage
from tests.object_store import KEYS, object_store

_NUM_BYTES = 96 << 20


@pytest.fixture
def location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[storage.Location]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    with object_store() as store:
        yield storage.locate(store.uri(tmp_path.name))  # buckets outlive the server


def test_an_upload_that_a_signal_interrupts_is_never_seen_in_part(
    location: storage.Location, tmp_path: Path
) -> None:
    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    def upload() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        storage.publish(file, location, file.name)
        pytest.fail("the upload was over before the signal came")

    file = tmp_path / "shard-00000.parquet"
    with open(file, "wb") as handle:
        handle.truncate(_NUM_BYTES)
    before = signal.signal(signal.SIGALRM, leave)
    try:
        with pytest.raises(SystemExit):
            upload()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    info = location.filesystem.get_file_info(location.file(file.name))
    assert info.size in (None, _NUM_BYTES)


def test_a_small_file_comes_and_is_replaced_as_a_whole(location: storage.Location) -> None:
    for text in (b"first", b"", b"second"):
        location.write_bytes("dataset.json", text)
        assert location.read_bytes("dataset.json") == text
    assert location.names() == ["dataset.json"]
    assert list((storage.cache_folder() / "upload").iterdir()) == []


def test_a_local_name_that_pyarrow_cannot_open_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"/M\\xfcnchen has bytes that are no text"):
        storage.locate(os.fsdecode(b"/M\xfcnchen"))
    assert storage.locate("/12:30 %20#?\n").path == "/12:30 %20#?\n"
