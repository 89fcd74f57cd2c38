"""jobs/pretrain.py: from a mirror to a backbone that a training starts from."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import torch

from lorat.config.training import TrainConfig, resolve
from lorat.model.network import build_model
from tests.jobs.in_process import run_in_process
from tests.small_packages import small_mirror


def test_a_backbone_is_made_from_a_mirror(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert run_in_process("pretrain", "train") == 2
    assert "holds no material" in capsys.readouterr().err
    mirror = small_mirror(tmp_path / "mirror", monkeypatch)
    assert run_in_process("pretrain", "fetch", "--mirror", mirror) == 0
    assert "2 photographs" in caplog.text

    assert run_in_process("pretrain", "preview", "--num-pairs", 2, "--output", "pairs.png") == 0
    assert cv2.imread("pairs.png").shape[0] > 2 * 168

    file = tmp_path / "made" / "backbone.safetensors"
    plan = ("--minutes", 0.004, "--coarse-share", 0, "--batch-size", 2)
    assert run_in_process("pretrain", "train", *plan, "--output", file) == 0
    assert file.stat().st_size < 5_000_000
    model = build_model(resolve(TrainConfig(variant="T-168", backbone=str(file))))
    other = build_model(resolve(TrainConfig(variant="T-168", backbone=str(file), seed=7)))
    for name, value in model.head.state_dict().items():  # the head came with the file
        assert torch.equal(value, other.head.state_dict()[name]), name
