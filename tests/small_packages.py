"""A Debian mirror in a folder, with one small package of pictures."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from lorat.data.synthetic import material
from lorat.data.synthetic.material import Package


def _encoded(image: np.ndarray, ending: str) -> bytes:
    return cv2.imencode(ending, image)[1].tobytes()


def _cutout(height: int = 90, width: int = 60) -> np.ndarray:
    """Return BGRA with an opaque ellipse inside a transparent margin of another colour."""
    image = np.full((height, width, 4), (255, 0, 255, 0), np.uint8)
    centre, axes = (width // 2, height // 2), (width // 3, height // 3)
    cv2.ellipse(image, centre, axes, 0, 0, 360, (30, 120, 200, 255), -1)
    return image


def _photograph(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 255, (height, width, 3), dtype=np.uint8)


def _write_package(file: Path, members: dict[str, bytes]) -> None:
    """Write a Debian package: an ar archive with an xz-compressed tar inside."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with file.open("wb") as stream:
        stream.write(b"!<arch>\n")
        parts = {
            "debian-binary": b"2.0\n",
            "control.tar.xz": b"odd",
            "data.tar.xz": packed.getvalue(),
        }
        for name, content in parts.items():
            header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
            stream.write(header.encode() + content + b"\n" * (len(content) % 2))


def small_mirror(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the folder, let its package be the only one that is wanted, return its address.

    It holds two photographs, a cut-out and a drawing, and four pictures that are of no use.
    """
    share = "./usr/share/"
    photograph = _photograph(300, 640)
    members = {
        f"{share}tuxpaint/stamps/animals/hen.png": _encoded(_cutout(), ".png"),
        f"{share}tuxpaint/stamps/animals/cartoon/hen.png": _encoded(_cutout(), ".png"),
        f"{share}openclipart/png/people/man.png": _encoded(_cutout(500, 300), ".png"),
        f"{share}openclipart/png/signs_and_symbols/flags/f.png": _encoded(_cutout(), ".png"),
        f"{share}backgrounds/wide.jpg": _encoded(_photograph(900, 1600), ".jpg"),
        f"{share}gcompris-qt/rcc/details.rcc": b"qres RIFF no picture"
        + _encoded(photograph, ".webp")
        + b"odd bytes"
        + _encoded(_cutout(400, 400), ".webp"),
        f"{share}doc/copyright": b"CC0",
    }
    folder.mkdir()
    file = folder / "some_1.deb"
    _write_package(file, members)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    package = Package("some", "1", "some_1.deb", digest, "CC0")
    monkeypatch.setattr(material, "PACKAGES", (package,))
    return folder.as_uri()
