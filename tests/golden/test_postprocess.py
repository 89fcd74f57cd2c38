"""From score map and boxes to the submitted box and the next state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorat.image.boxes import clip_box
from lorat.image.crops import CropParams
from lorat.tracking.postprocess import box_in_frame, find_peak, hann_window, next_box, penalise
from tests.golden.fixture_files import golden, name_of

COVERS = ("*_postprocess.npz",)


@pytest.mark.parametrize("path", golden("*_postprocess.npz"), ids=name_of)
def test_postprocess(path: Path) -> None:
    data = np.load(path)
    logits_BHW = torch.from_numpy(data["score_map_logits"])
    window_HW = hann_window(*logits_BHW.shape[1:])
    np.testing.assert_allclose(window_HW.numpy(), data["window"], atol=1e-6)
    boxes_BHW4 = torch.from_numpy(data["boxes_normalized"])
    penalty = float(data["window_penalty"])
    penalised_BHW = penalise(logits_BHW.sigmoid(), window_HW, penalty)
    np.testing.assert_allclose(penalised_BHW.numpy(), data["penalized_score"], atol=1e-6)
    peak = find_peak(logits_BHW, boxes_BHW4, window_HW, penalty)
    best_B = torch.from_numpy(data["best_index"])
    best_B4 = boxes_BHW4.flatten(1, 2)[torch.arange(len(best_B)), best_B]
    np.testing.assert_array_equal(peak.box_B4.numpy(), best_B4.float().numpy())
    np.testing.assert_allclose(peak.confidence_B.numpy(), data["confidence"], atol=1e-6)
    size = int(data["search_size"])
    for row, box_norm in enumerate(peak.box_B4.double().tolist()):
        box_px = np.array(box_norm) * size
        np.testing.assert_allclose(box_px, data["box_in_crop_pixels"][row], rtol=1e-5, atol=1e-5)
        params = CropParams(*data["crop_params_adjusted"][row].flatten().tolist())
        found = box_in_frame(tuple(box_norm), size, params)
        np.testing.assert_allclose(found, data["box_in_image_unclipped"][row], atol=1e-5)
        frame_wh = tuple(data["image_size_wh"][row].tolist())
        submitted = clip_box(found, *frame_wh)
        np.testing.assert_allclose(submitted, data["box_in_image_clipped"][row], atol=1e-5)
        state = next_box(submitted, tuple(data["previous_bbox"][row].tolist()), frame_wh)
        np.testing.assert_allclose(state, data["next_state_bbox"][row], atol=1e-5)
