"""The tracker reproduces the published one on whole videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from lorat.checkpoint.official import import_official
from lorat.config.tracking import TrackingConfig
from lorat.config.variants import Variant
from lorat.tracking.tracker import Tracker
from tests.golden.fixture_files import beside, golden, name_of
from tests.golden.official_sets import with_scaling
from tests.lorat.tracking.recorded_ops import as_on_a_gpu

COVERS = ("*_track.npz", "*_track_checkpoint.safetensors")


def variant_of_track(data: Any, checkpoint: Path) -> Variant:
    with safe_open(checkpoint, "numpy") as file:
        ffn = "swiglu" if any(".mlp.w12." in key for key in file.keys()) else "mlp"  # noqa: SIM118
    return Variant(
        name="fixture",
        timm_name=None,
        dim=int(data["meta_embed_dim"]),
        depth=int(data["meta_depth"]),
        num_heads=int(data["meta_num_heads"]),
        ffn=ffn,
        template_size=int(data["template_size"]),
        search_size=int(data["search_size"]),
        template_area_factor=float(data["template_area_factor"]),
        search_area_factor=float(data["search_area_factor"]),
    )


@pytest.mark.parametrize("path", golden("*_track.npz"), ids=name_of)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one by one"])
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
def test_boxes_and_scores_of_whole_videos(path: Path, batched: bool, captured: bool) -> None:
    data = np.load(path)
    assert float(data["window_penalty"]) == TrackingConfig().window_penalty
    assert float(data["min_object_size"]) == TrackingConfig().min_object_size
    checkpoint = beside(path, "_track.npz", "_track_checkpoint.safetensors")
    weights, variant = with_scaling(checkpoint, data), variant_of_track(data, checkpoint)
    model = import_official(weights, variant, backbone="none")
    tracker = Tracker(model, device="cpu")
    recorder = as_on_a_gpu(tracker) if captured else None
    frames, init_boxes = data["frames_uint8"], data["init_boxes_xyxy"]
    num_videos, num_frames = frames.shape[:2]
    boxes = np.empty((num_videos, num_frames, 4))
    scores = np.ones((num_videos, num_frames))
    boxes[:, 0] = init_boxes
    if batched:
        targets = tracker.start(list(frames[:, 0]), init_boxes.tolist())
        for step in range(1, num_frames):
            boxes[:, step], scores[:, step] = tracker.step(targets, list(frames[:, step]))
    else:
        for video in range(num_videos):
            tracker.init(frames[video, 0], init_boxes[video].tolist())
            for step in range(1, num_frames):
                boxes[video, step], scores[video, step] = tracker.update(frames[video, step])
    assert recorder is None or recorder.num_records == 1
    np.testing.assert_allclose(scores, data["confidence"], atol=1e-5)
    np.testing.assert_allclose(boxes, data["pred_boxes_xyxy"], atol=1e-3)
