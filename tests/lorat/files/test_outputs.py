"""A place that cannot be written is refused before the work, and nothing is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorat.errors import UserError
from lorat.files.outputs import check_file, check_folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "folder is a folder; give the name of a file"),
        ("a_file/o.mp4", "cannot be a folder: .*a_file is none"),
        ("a_file/new/o.mp4", "cannot be a folder: .*a_file is none"),
        ("dangling/o.mp4", "cannot be a folder: .*dangling is none"),
        ("n" * 256, "cannot be written .File name too long"),
        ("new/" + "n" * 256 + "/o.mp4", "cannot be written .File name too long"),
        ("a\nb/" + "n" * 256, r"a\\nb"),
    ],
)
def test_a_file_that_cannot_be_is_one_sentence(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a_file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message) as raised:
        check_file(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_what_can_be_written_passes_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "old.mp4").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("new.mp4", "old.mp4", "new/deep/o.mp4", "link/o.mp4", "n" * 255, "12:30.mp4"):
        check_file(tmp_path / name)
        check_folder(tmp_path / "a" / name)
    check_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["link", "old.mp4"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        check_file(tmp_path / "o.mp4")
    tmp_path.chmod(0o700)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
def test_a_file_system_that_takes_nothing_is_named() -> None:
    with pytest.raises(UserError, match=r"/proc/o\.mp4 cannot be written"):
        check_file(Path("/proc/o.mp4"))
