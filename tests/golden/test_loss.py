"""Target assignment, losses and their gradients are the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorat.learning.criterion import Criterion, positive_mask
from tests.golden.fixture_files import golden, name_of

COVERS = ("*_loss.npz",)
SETS = pytest.mark.parametrize("path", golden("*_loss.npz"), ids=name_of)


@SETS
def test_positive_cells(path: Path) -> None:
    io = np.load(path)
    map_size, search_size = int(io["map_size"]), float(io["search_size"])
    mask = positive_mask(torch.from_numpy(io["gt_boxes_crop_pixels"]), search_size, map_size)
    assert np.array_equal(mask.numpy(), io["positive_mask"])
    batch_index, cell_index = mask.flatten(1).nonzero(as_tuple=True)
    assert np.array_equal(batch_index.numpy(), io["positive_batch_idx"])
    assert np.array_equal(cell_index.numpy(), io["positive_map_idx"])
    normalised = torch.from_numpy(io["gt_boxes_crop_pixels"] / search_size).float()
    np.testing.assert_allclose(normalised, io["gt_boxes_normalized"], rtol=1e-6)
    # What training uses has only the normalised boxes.
    assert torch.equal(positive_mask(normalised, 1.0, map_size), mask)
    assert Criterion.count_positives(normalised, map_size) == io["num_positive"].item()


@SETS
def test_losses_and_gradients(path: Path) -> None:
    io = np.load(path)
    outputs = {
        "score_map": torch.from_numpy(io["score_map_logits"]).requires_grad_(),
        "boxes": torch.from_numpy(io["pred_boxes"]).requires_grad_(),
    }
    losses = Criterion()(outputs, torch.from_numpy(io["gt_boxes_normalized"]))
    for ours, published in (
        ("loss", "loss_total"),
        ("loss_cls", "loss_cls"),
        ("loss_reg", "loss_reg"),
        ("num_positive", "num_positive"),
    ):
        np.testing.assert_allclose(losses[ours].item(), io[published].item(), rtol=1e-6)
    losses["loss"].backward()
    for ours, published in (("score_map", "grad_score_map"), ("boxes", "grad_boxes")):
        gradient = outputs[ours].grad
        assert gradient is not None
        np.testing.assert_allclose(gradient, io[published], rtol=1e-5, atol=1e-7)


@SETS
def test_other_weights_without_iou_targets(path: Path) -> None:
    io = np.load(path)
    outputs = {
        "score_map": torch.from_numpy(io["score_map_logits"]),
        "boxes": torch.from_numpy(io["pred_boxes"]),
    }
    criterion = Criterion(cls_weight=2.0, reg_weight=0.5, iou_aware=False)
    losses = criterion(outputs, torch.from_numpy(io["gt_boxes_normalized"]))
    expected = io["alt_loss_total_noniouaware_w2_w05"].item()
    np.testing.assert_allclose(losses["loss"].item(), expected, rtol=1e-6)
    for name in ("loss_cls", "loss_reg"):
        np.testing.assert_allclose(losses[name].item(), io[f"alt_{name}"].item(), rtol=1e-6)
