"""Exported files compute what PyTorch computes, for any batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lorat.checkpoint.export import FORMATS, INPUTS, TOLERANCE, export, random_inputs
from lorat.checkpoint.folder import load, load_merged
from lorat.config.tracking import TrackingConfig
from lorat.errors import UserError
from lorat.model.network import LoRAT
from lorat.tracking.tracker import Tracker
from tests.constant_trackers import random_tracker


@pytest.fixture(scope="module")
def model() -> LoRAT:
    """An untrained model whose outputs are spread over their ranges."""
    model = random_tracker()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.tracking = TrackingConfig(
        window_penalty=0.3, min_object_size=35.0, search_area_factor=3.0
    )
    return model


@pytest.fixture(scope="module")
def folder(model: LoRAT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    reports = export(model, folder)
    assert [report.format for report in reports] == list(FORMATS)
    assert all(report.passed for report in reports)
    return folder


def expected(model: LoRAT, batch: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    inputs = random_inputs(model, batch, seed=99)
    with torch.no_grad():
        return inputs, model.merge()(*inputs)


def test_parity_is_reported(folder: Path) -> None:
    report = json.loads((folder / "parity.json").read_text())
    assert report["variant"] == "N-112"
    for row in report["formats"]:
        assert row["passed"]
        assert max(row["max_score_error"], row["max_box_error"]) <= TOLERANCE
        assert row["megabytes"] > 0.1


def test_bundle_is_a_deployable_model(folder: Path, model: LoRAT) -> None:
    inputs, outputs = expected(model, 2)
    with torch.no_grad():
        found = load_merged(folder / "bundle")(*inputs)
    assert torch.equal(found["score_map"], outputs["score_map"])
    assert load_merged(folder / "bundle").tracking == model.tracking


def test_the_released_layout_is_read_as_a_released_file(folder: Path, model: LoRAT) -> None:
    again = load(folder / "official.safetensors", variant="N-112", backbone="none")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("batch", [1, 5])
def test_onnx_agrees_for_any_batch(folder: Path, model: LoRAT, batch: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    inputs, outputs = expected(model, batch)
    feed = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)}
    scores, boxes = session.run(["score_map", "boxes"], feed)
    assert np.asarray(scores).std() > 0.05
    np.testing.assert_allclose(scores, outputs["score_map"].numpy(), atol=1e-4)
    np.testing.assert_allclose(boxes, outputs["boxes"].numpy(), atol=1e-4)


def test_the_onnx_example_tracks_a_video_as_the_tracker_does(
    folder: Path, model: LoRAT, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 80, (6, 96, 128, 3), dtype=np.uint8)
    for t, frame in enumerate(frames):
        frame[30:54, 40 + 3 * t : 70 + 3 * t] = (220, 120, 30)
        cv2.imwrite(str(tmp_path / f"{t:04d}.png"), frame[:, :, ::-1])
    box = (40.0, 30.0, 70.0, 54.0)
    tracker = Tracker(model, device="cpu")
    tracker.init(frames[0], box)
    usual = Tracker(model, device="cpu", tracking=TrackingConfig())
    usual.init(frames[0], box)
    expected, other = [[*box, 1.0]], [[*box, 1.0]]
    for frame in frames[1:]:
        found, score = tracker.update(frame)
        expected.append([*found, score])
        found, score = usual.update(frame)
        other.append([*found, score])
    assert np.abs(np.array(expected) - other).max() > 1, "how to track makes no difference here"
    example = Path(__file__).parents[3] / "infra" / "track_onnx.py"
    code = "import runpy, sys; sys.modules |= {'lorat': None, 'torch': None}; sys.argv.pop(0); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(example), str(folder / "model.onnx")]
    command += [str(tmp_path / "%04d.png"), *map(str, box)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    rows = [[float(value) for value in line.split(",")] for line in done.stdout.splitlines()]
    assert np.ptp(np.array(expected)[:, 0]) > 1
    np.testing.assert_allclose(rows, expected, atol=0.05)


def test_program_loads_without_our_code(folder: Path, model: LoRAT) -> None:
    inputs, outputs = expected(model, 4)
    np.savez(folder / "inputs.npz", *[value.numpy() for value in inputs])
    code = (
        "import sys, numpy as np, torch\n"
        "sys.modules['lorat'] = None\n"
        "program = torch.export.load('model.pt2').module()\n"
        "data = np.load('inputs.npz')\n"
        "out = program(*[torch.from_numpy(data[k]) for k in data.files])\n"
        "np.save('scores.npy', out[0].detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    scores = np.load(folder / "scores.npy")
    np.testing.assert_allclose(scores, outputs["score_map"].numpy(), atol=1e-4)


def test_a_file_that_gives_no_numbers_has_not_passed(
    model: LoRAT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_broken(folder: Path) -> LoRAT:
        broken = load_merged(folder)
        with torch.no_grad():
            next(broken.head.parameters()).fill_(float("nan"))
        return broken

    monkeypatch.setattr("lorat.checkpoint.export.load_merged", load_broken)
    (report,) = export(model, tmp_path, ("bundle",))
    assert not report.passed
    assert np.isnan(report.max_score_error) or np.isnan(report.max_box_error)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    written = json.loads((tmp_path / "parity.json").read_text(), parse_constant=refuse)
    assert None in (
        written["formats"][0]["max_score_error"],
        written["formats"][0]["max_box_error"],
    )


def test_a_model_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    diverged = random_tracker()
    with torch.no_grad():
        next(diverged.head.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        export(diverged, tmp_path, ("bundle",))
    assert not (tmp_path / "parity.json").exists()


def test_unknown_format_is_refused(model: LoRAT, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bundle, onnx, program"):
        export(model, tmp_path, ("tensorrt",))
