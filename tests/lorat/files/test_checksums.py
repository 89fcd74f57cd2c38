"""Checkpoints and bundles are what was written, to the last bit, or are refused."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from lorat.checkpoint.export import export
from lorat.checkpoint.folder import load, save, save_merged
from lorat.checkpoint.training_state import load_training_state, read_step, save_training_state
from lorat.config.training import resolve
from lorat.errors import UserError
from lorat.files.checksums import is_intact, seal
from lorat.learning.optimisation import build_optimizer
from lorat.model.network import LoRAT
from tests.lorat.tiny_models import tiny_config, tiny_model

CONFIG = resolve(tiny_config())


@pytest.fixture(scope="module")
def model() -> LoRAT:
    return tiny_model()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: LoRAT) -> Path:
    """Return a folder with a checkpoint and a bundle."""
    folder = tmp_path_factory.mktemp("written")
    save(model, CONFIG, folder / "checkpoint")
    save_training_state(folder / "checkpoint", model, build_optimizer(model, CONFIG), step=4)
    save_merged(model, folder / "bundle")
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def read_all(folder: Path, model: LoRAT) -> None:
    """Read everything that a checkpoint and a bundle hold."""
    load(folder / "checkpoint")
    load_training_state(folder / "checkpoint", model, build_optimizer(model, CONFIG))
    load(folder / "bundle")


def test_a_flipped_bit_anywhere_is_refused(folder: Path, model: LoRAT) -> None:
    rng = random.Random(0)
    read_all(folder, model)
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"]
    assert len(files) == 11
    for file in files:
        before = file.read_bytes()
        for _ in range(4):
            place = rng.randrange(len(before))
            flipped = bytes([before[place] ^ 1 << rng.randrange(8)])
            file.write_bytes(before[:place] + flipped + before[place + 1 :])
            with pytest.raises(UserError, match=r"is damaged.*restore that folder, or delete it"):
                read_all(folder, model)
        file.write_bytes(before)
    read_all(folder, model)


def test_the_checksums_are_those_of_sha256sum(folder: Path) -> None:
    for name in ("checkpoint", "bundle"):
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        subprocess.run(command, cwd=folder / name, check=True, capture_output=True)


def test_a_folder_of_an_earlier_version_loads_and_says_that_it_carries_none(
    folder: Path, model: LoRAT, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("checkpoint", "bundle"):
        (folder / name / "SHA256SUMS").unlink()
    read_all(folder, model)
    for name in ("checkpoint", "bundle"):
        assert f"{name} carries no checksums" in caplog.text


def test_what_is_written_anew_is_sealed_anew(folder: Path, model: LoRAT) -> None:
    save_training_state(folder / "checkpoint", model, build_optimizer(model, CONFIG), step=5)
    assert read_step(folder / "checkpoint") == 5
    assert is_intact(folder / "checkpoint")
    sums = folder / "checkpoint" / "SHA256SUMS"
    sums.write_bytes(b"\xff\xfe")
    assert not is_intact(folder / "checkpoint")
    seal(folder / "checkpoint", "config.json")
    assert sums.read_text().endswith("  config.json\n")


def test_an_exported_file_is_compared_where_it_is_listed(tmp_path: Path, model: LoRAT) -> None:
    export(model, tmp_path, ("bundle", "official"))
    file = tmp_path / "official.safetensors"
    load(file, variant="N-112")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged: its SHA-256"):
        load(file, variant="N-112")
    (tmp_path / "SHA256SUMS").write_text("")
    load(file, variant="N-112")
