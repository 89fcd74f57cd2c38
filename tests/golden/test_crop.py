"""Crops, their adjusted parameters, mapped boxes and foreground masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorat.image.boxes import enlarge_to_minimum
from lorat.image.crops import crop_params, foreground_mask, resample
from lorat.model.normalisation import normalize_
from lorat.tracking.search_crops import DeviceCrops
from tests.golden.fixture_files import golden, name_of

COVERS = ("*_crop.npz",)

MIN_OBJECT_SIZE = 10


@pytest.mark.parametrize("path", golden("*_crop.npz"), ids=name_of)
@pytest.mark.parametrize("role", ["z", "x"])
def test_crops(path: Path, role: str) -> None:
    data = np.load(path)
    prefix = {"z": "template", "x": "search"}[role]
    size, factor = int(data[f"{prefix}_size"]), float(data[f"{prefix}_area_factor"])
    for case in range(int(data["num_cases"])):
        expected = {
            key.removeprefix(f"c{case}_"): data[key]
            for key in data.files
            if key.startswith(f"c{case}_")
        }
        box = tuple(expected["bbox_xyxy"].tolist())
        seen = enlarge_to_minimum(box, MIN_OBJECT_SIZE) if role == "x" else box
        nominal = crop_params(seen, factor, size)
        np.testing.assert_allclose(
            np.reshape(nominal, (2, 2)), expected[f"{role}_params_nominal"], rtol=1e-6, atol=1e-9
        )
        image = data["image_hwc_uint8"]
        np.testing.assert_allclose(
            image.reshape(-1, 3).mean(axis=0), expected["image_mean"], rtol=1e-5
        )
        crop_HWC, adjusted = resample(image, nominal, size, expected["image_mean"])
        np.testing.assert_allclose(
            np.reshape(adjusted, (2, 2)), expected[f"{role}_params_adjusted"], rtol=1e-6, atol=1e-9
        )
        np.testing.assert_allclose(
            crop_HWC.transpose(2, 0, 1), expected[f"{role}_crop_0_255"], atol=1e-3
        )
        on_device = DeviceCrops(size, torch.device("cpu"))
        fill_rgb = expected["image_mean"].astype(np.float32)
        sent = on_device.send(on_device.cut([image], [nominal], [fill_rgb])[1])
        np.testing.assert_allclose(
            on_device.crops(sent, 1)[0].permute(2, 0, 1).numpy(),
            expected[f"{role}_crop_0_255"],
            atol=1e-3,
        )
        np.testing.assert_allclose(
            adjusted.apply(box), expected[f"{role}_bbox"], rtol=1e-6, atol=1e-5
        )
        if role == "x":
            continue
        normalized_CHW = normalize_(torch.from_numpy(crop_HWC).permute(2, 0, 1)[None] / 255)[0]
        patch = expected["z_normalized_patch"]
        np.testing.assert_allclose(
            normalized_CHW[:, : patch.shape[1], : patch.shape[2]].numpy(), patch, atol=1e-5
        )
        np.testing.assert_allclose(
            normalized_CHW.double().sum().item(),
            expected["z_normalized_sum"],
            atol=1e-6 * normalized_CHW.numel(),
        )
        mask = foreground_mask(adjusted.apply(box), size, int(data["template_feat"]))
        np.testing.assert_array_equal(mask, expected["z_feat_mask_eval"])
        np.testing.assert_array_equal(mask, expected["z_feat_mask_train"])
