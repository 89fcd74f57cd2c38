"""Photographs and cut-outs of freely licensed packages: what the pretraining's pairs are made of.

The packages are Debian's; they are fetched, checked and unpacked here, without Debian's tools.  Of
their pictures three piles are made, each shrunk to what a crop can show:

- photographs: backgrounds, textures, and regions that are tracked;
- cut-outs: photographs of things, people and animals along their silhouettes;
- drawings: the same as drawn, for more silhouettes than the cut-outs have.
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import cv2
import numpy as np
from tqdm import tqdm

from lorat.config.json_files import write_json
from lorat.errors import UserError, reason
from lorat.files.checksums import sha256_of
from lorat.files.scratch import make_folder, whole_file
from lorat.files.storage import cache_folder

log = logging.getLogger(__name__)

MIRROR = "http://deb.debian.org/debian"
VERSION = 1
"""Part of the folder's name; raise it when a change alters what is kept of the packages."""
PHOTOGRAPH_SIDE = 400
"""Shorter side of a photograph, in pixels, where it has as much."""
CUTOUT_SIDE = 200
"""Longer side of a cut-out, in pixels, where it has as much."""
DRAWING_SIDE = 140
"""The same of a drawing."""
PILES = ("photographs", "cutouts", "drawings")


class Package(NamedTuple):
    """One of Debian's packages."""

    name: str
    version: str
    pool: str
    """Path of the file on a mirror."""
    sha256: str
    licence: str
    """In short; the package's own ``copyright`` says it per file."""


PACKAGES = (
    Package("tuxpaint-stamps-default", "2022.06.04-1",
            "pool/main/t/tuxpaint-stamps/tuxpaint-stamps-default_2022.06.04-1_all.deb",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
            "GPL-2"),
    Package("gcompris-qt-data", "3.1-2",
            "pool/main/g/gcompris-qt/gcompris-qt-data_3.1-2_all.deb",
            "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
            "per file: public domain, CC0, CC-BY, CC-BY-SA, GPL"),
    Package("openclipart-png", "1:0.18+dfsg-19",
            "pool/main/o/openclipart/openclipart-png_0.18%2bdfsg-19_all.deb",
            "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
            "public domain"),
    Package("gnome-backgrounds", "43.1-1",
            "pool/main/g/gnome-backgrounds/gnome-backgrounds_43.1-1_all.deb",
            "a670dea21572652127d6e55f9cdb3a226d0037854fdbfd037003c7d00ee0dc4e",
            "per file: GPL-2+, CC-BY-SA-3.0, CC-BY-SA-2.0, CC-BY-2.0"),
    Package("mate-backgrounds", "1.26.0-1",
            "pool/main/m/mate-backgrounds/mate-backgrounds_1.26.0-1_all.deb",
            "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
            "GPL-2+, CC-BY-SA-4.0"),
    Package("ukui-wallpapers", "20.04.3-1.1",
            "pool/main/u/ukui-wallpapers/ukui-wallpapers_20.04.3-1.1_all.deb",
            "6d49be70152e6d603163458e177e501deb0be8f2916389ccbfcf59b0d7fc0262",
            "CC-BY-SA-3.0"),
    Package("lomiri-wallpapers-16.04", "20.04.0-2",
            "pool/main/l/lomiri-wallpapers/lomiri-wallpapers-16.04_20.04.0-2_all.deb",
            "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
            "per file: CC-BY-4.0, CC-BY-SA-4.0, CC0"),
    Package("lomiri-wallpapers-20.04", "20.04.0-2",
            "pool/main/l/lomiri-wallpapers/lomiri-wallpapers-20.04_20.04.0-2_all.deb",
            "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
            "CC-BY-SA-3.0"),
    Package("plasma-workspace-wallpapers", "4:5.27.5-2",
            "pool/main/p/plasma-workspace-wallpapers/plasma-workspace-wallpapers_5.27.5-2_all.deb",
            "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
            "GPL-2+"),
    Package("opencv-doc", "4.6.0+dfsg-12",
            "pool/main/o/opencv/opencv-doc_4.6.0+dfsg-12_all.deb",
            "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
            "Apache-2.0, BSD"),
)  # fmt: skip
"""What is fetched, 650 MB in all; none of it is a frame of a tracking benchmark."""

_PICTURE = re.compile(r"\.(png|jpe?g|webp)$")
_NO_STAMPS = re.compile(r"symbols/(?!alphabets/asl)|cartoon|/flags/|roadsigns|naturalforces|space/")
_DRAWN = re.compile(
    r"/png/(animals|people|transportation/(vehicles|boating)|food|tools|recreation/(toys|sports|"
    r"music)|buildings|plants|computer/hardware|electronics|education|office)/"
)
_STILLS = re.compile(
    r"/(fruits|baboon|squirrel_cls|home|aloeL|messi5|starry_night|aero1|aero3|butterfly|building|"
    r"graf1|leuvenA|ela_original|box_in_scene|orange|apple|chicky_512|board)\.(jpg|png)$"
)
_RESOURCES = re.compile(
    r"/(categorization|clickgame|details|erase|explore_\w+|leftright|louis-braille|paintings|"
    r"photo_hunter)\.rcc$"
)


def piles_folder() -> Path:
    """Return the folder in which this machine keeps the piles."""
    return cache_folder() / f"material-v{VERSION}"


def fetch(folder: Path, mirror: str = MIRROR) -> list[Path]:
    """Download the packages that a folder lacks, and check all of them.

    Args:
        folder: receives the packages' files; made if it is missing.
        mirror: address under which the pool of a Debian mirror lies.

    Raises:
        UserError: if one cannot be had, or is not the one that is named here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for package in PACKAGES:
        file = folder / package.pool.rpartition("/")[2]
        if not file.exists() or sha256_of(file) != package.sha256:
            log.info("Fetching %s %s (%s).", package.name, package.version, package.licence)
            address = f"{mirror.rstrip('/')}/{package.pool}"
            try:
                with whole_file(file) as part:
                    request = urllib.request.urlopen(address, timeout=60)
                    with request as answer, part.open("wb") as stream:
                        shutil.copyfileobj(answer, stream)
                    if (found := sha256_of(part)) != package.sha256:
                        raise UserError(
                            f"{address} has SHA-256 {found}, not that of {package.name} "
                            f"{package.version}; give another mirror."
                        )
            except OSError as error:
                raise UserError(
                    f"{address} cannot be fetched ({reason(error)}); connect, or give a mirror "
                    "that has this version, such as a date of https://snapshot.debian.org."
                ) from error
        files.append(file)
    return files


def unpack(package: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the regular files of a Debian package, in its order.

    A package is an ``ar`` archive, whose member ``data.tar.*`` holds the files.

    Raises:
        UserError: if it is none.
    """
    with package.open("rb") as stream:
        if stream.read(8) != b"!<arch>\n":
            raise UserError(f"{package} is no Debian package; delete it and fetch it again.")
        while header := stream.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if not name.startswith("data.tar"):
                stream.seek(size + size % 2, io.SEEK_CUR)
                continue
            with tarfile.open(fileobj=stream, mode="r|*") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None:
                        yield member.name, content.read()
            return
    raise UserError(f"{package} holds no files; delete it and fetch it again.")


def pictures_of(name: str, content: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Yield pile, name and encoded image of what a package's file gives, if anything."""
    if _RESOURCES.search(name):
        for number, image in enumerate(webp_inside(content)):
            yield "photographs", f"{name}#{number}", image
    elif not _PICTURE.search(name):
        return
    elif "/stamps/" in name and not _NO_STAMPS.search(name):
        yield "cutouts", name, content
    elif _DRAWN.search(name):
        yield "drawings", name, content
    elif "/examples/data/" in name:
        if _STILLS.search(name):
            yield "photographs", name, content
    elif re.search(r"/(backgrounds|wallpapers)/", name) and "screenshot" not in name:
        yield "photographs", name, content


def webp_inside(content: bytes) -> Iterator[bytes]:
    """Cut the WebP images out of any file, such as Qt's resources, by their length fields."""
    at = content.find(b"RIFF")
    while at >= 0:
        size = int.from_bytes(content[at + 4 : at + 8], "little") + 8
        is_webp = content[at + 8 : at + 12] == b"WEBP" and at + size <= len(content)
        if is_webp:
            yield content[at : at + size]
        at = content.find(b"RIFF", at + (size if is_webp else 4))


def shrink(pile: str, encoded: bytes) -> np.ndarray | None:
    """Decode a picture for its pile; none if it does not belong there.

    Returns:
        RGB uint8 (h, w, 3) of a photograph; RGBA uint8 of the others, cut to what is opaque,
        colours multiplied by the alpha.
    """
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.ndim != 3 or image.dtype != np.uint8:
        return None
    has_holes = image.shape[2] == 4 and bool((image[..., 3] < 128).mean() > 0.02)
    if pile == "photographs":
        sides = image.shape[:2]
        if has_holes or min(sides) < 150:
            return None
        rgb = cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_BGR2RGB)
        return _fit(rgb, PHOTOGRAPH_SIDE / min(sides))
    if not has_holes:
        return None
    x, y, width, height = cv2.boundingRect((image[..., 3] > 127).astype(np.uint8))
    if min(width, height) < 24 or max(width, height) > 5 * min(width, height):
        return None
    rgba = cv2.cvtColor(image[y : y + height, x : x + width], cv2.COLOR_BGRA2RGBA)
    side = CUTOUT_SIDE if pile == "cutouts" else DRAWING_SIDE
    rgba[..., :3] = rgba[..., :3] * rgba[..., 3:].astype(np.uint16) // 255
    rgba = _fit(rgba, side / max(width, height))
    return rgba if (rgba[..., 3] > 127).mean() > 0.1 else None


def _fit(image: np.ndarray, scale: float) -> np.ndarray:
    if scale >= 1:
        return image
    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


@dataclass(frozen=True, kw_only=True)
class Material:
    """The piles; their arrays are views of mapped files, so processes share the memory."""

    photographs: list[np.ndarray]
    """RGB uint8 (h, w, 3) each."""
    cutouts: list[np.ndarray]
    """RGBA uint8 (h, w, 4) each, colours multiplied by the alpha."""
    drawings: list[np.ndarray]
    """RGBA uint8, likewise."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open what :func:`prepare` wrote.

        Raises:
            UserError: if there is nothing of the kind.
        """
        if not (folder / "piles.json").exists():
            raise UserError(
                f"{folder} holds no material; fetch it with 'python jobs/pretrain.py fetch'."
            )
        shapes = json.loads((folder / "piles.json").read_text())
        piles: dict[str, list[np.ndarray]] = {}
        for pile in PILES:
            flat = np.load(folder / f"{pile}.npy", mmap_mode="r").view(np.ndarray)
            piles[pile], at = [], 0
            for shape in shapes[pile]:
                size = int(np.prod(shape))
                piles[pile].append(flat[at : at + size].reshape(shape))
                at += size
        return cls(**piles)


def prepare(packages: list[Path], target: Path) -> Material:
    """Make the piles of the packages, about 300 MB, unless they are there."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        piles: dict[str, list[np.ndarray]] = {pile: [] for pile in PILES}
        for package in tqdm(packages, desc="pictures", unit="package"):
            for name, content in unpack(package):
                for pile, _, encoded in pictures_of(name, content):
                    picture = shrink(pile, encoded)
                    if picture is not None:
                        piles[pile].append(picture)
        folder = make_folder(f".{target.name}", target.parent)
        for pile, pictures in piles.items():
            np.save(folder / f"{pile}.npy", np.concatenate([p.ravel() for p in pictures]))
        shapes = {pile: [p.shape for p in pictures] for pile, pictures in piles.items()}
        write_json(shapes, folder / "piles.json")
        folder.chmod(0o755)
        folder.rename(target)
    return Material.open(target)
