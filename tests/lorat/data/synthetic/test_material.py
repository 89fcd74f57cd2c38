"""Material: packages are checked, unpacked without Debian's tools, and only pictures are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorat.data.synthetic import material
from lorat.data.synthetic.material import Material
from lorat.errors import UserError
from tests.small_packages import small_mirror


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the address of a mirror with one small package, the only one that is wanted."""
    return small_mirror(tmp_path / "mirror", monkeypatch)


def test_a_package_becomes_piles_of_what_can_be_used(tmp_path: Path, mirror: str) -> None:
    packages = material.fetch(tmp_path / "packages", mirror)
    piles = material.prepare(packages, tmp_path / "piles")
    assert {p: len(getattr(piles, p)) for p in material.PILES} == {
        "photographs": 2,  # not the resource with holes
        "cutouts": 1,  # not the cartoon
        "drawings": 1,  # not the flag
    }
    assert sorted(p.shape for p in piles.photographs) == [(300, 640, 3), (400, 711, 3)]
    assert max(piles.drawings[0].shape[:2]) == material.DRAWING_SIDE
    cutout = piles.cutouts[0]
    assert cutout.shape == (61, 41, 4)  # the margin is cut off
    assert (cutout[0, 0] == 0).all()  # and what is transparent adds no colour
    assert cutout[30, 20].tolist() == [200, 120, 30, 255]
    again = Material.open(tmp_path / "piles")
    np.testing.assert_array_equal(again.photographs[1], piles.photographs[1])


def test_what_is_already_there_is_not_fetched_again(tmp_path: Path, mirror: str) -> None:
    material.fetch(tmp_path / "packages", mirror)
    assert material.fetch(tmp_path / "packages", "file:///nowhere")[0].name == "some_1.deb"


def test_a_package_of_another_content_is_refused(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = material.PACKAGES[0]._replace(sha256="0" * 64)
    monkeypatch.setattr(material, "PACKAGES", (wrong,))
    with pytest.raises(UserError, match="not that of some 1; give another mirror"):
        material.fetch(tmp_path / "packages", mirror)
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_mirror_that_cannot_be_reached_is_named(tmp_path: Path, mirror: str) -> None:
    with pytest.raises(UserError, match=r"nowhere/some_1\.deb cannot be fetched"):
        material.fetch(tmp_path / "packages", "file:///nowhere")


def test_no_package_and_no_material_are_told_apart_from_them(tmp_path: Path) -> None:
    (tmp_path / "odd.deb").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="is no Debian package"):
        list(material.unpack(tmp_path / "odd.deb"))
    with pytest.raises(UserError, match=r"holds no material.*pretrain\.py fetch"):
        Material.open(tmp_path)


def test_every_package_says_its_licence_and_is_pinned() -> None:
    assert all(p.licence and len(p.sha256) == 64 for p in material.PACKAGES)
    assert all(p.pool.startswith("pool/main/") for p in material.PACKAGES)
