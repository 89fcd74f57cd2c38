"""Targets and loss: what the fixtures do not show."""

from __future__ import annotations

import pytest
import torch

from lorat.learning.criterion import Criterion, iou_and_giou, positive_mask


def random_outputs(batch: int = 4, side: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(batch, side, side, 2, generator=generator)
    size = torch.rand(batch, side, side, 2, generator=generator)
    return {
        "score_map": torch.randn(batch, side, side, generator=generator),
        "boxes": torch.cat([corner - size / 2, corner + size / 2], dim=-1),
    }


BOXES = torch.tensor(
    [[0.1, 0.2, 0.4, 0.7], [0.5, 0.5, 0.9, 0.6], [0, 0, 1, 1], [0.3, 0.3, 0.31, 0.32]]
)


def test_every_touched_cell_is_positive() -> None:
    mask = positive_mask(torch.tensor([[15.0, 30.0, 28.5, 43.0]]), 112, 8)[0]
    rows, columns = mask.nonzero(as_tuple=True)
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {
        (r, c) for r in (2, 3) for c in (1, 2)
    }


def test_a_box_up_to_a_cell_edge_does_not_touch_the_next_cell() -> None:
    assert positive_mask(torch.tensor([[14.0, 14.0, 28.0, 28.0]]), 112, 8).sum() == 1


def test_giou_of_apart_boxes_is_negative() -> None:
    iou, giou = iou_and_giou(torch.tensor([0.0, 0, 1, 1]), torch.tensor([3.0, 0, 4, 1]))
    assert iou == 0 and giou.item() == pytest.approx(-0.5)


def test_workers_with_the_mean_count_add_up_to_the_global_batch() -> None:
    outputs, criterion = random_outputs(), Criterion()
    whole = criterion(outputs, BOXES)
    halves = [slice(0, 2), slice(2, 4)]
    mean = sum(Criterion.count_positives(BOXES[h], 8) for h in halves) / 2
    parts = [
        criterion({k: v[h] for k, v in outputs.items()}, BOXES[h], num_positive=mean)
        for h in halves
    ]
    for name in ("loss", "loss_cls", "loss_reg"):
        # DDP averages over the workers.
        torch.testing.assert_close(sum(p[name] for p in parts) / 2, whole[name])


def test_without_positives_the_box_loss_is_zero_and_differentiable() -> None:
    outputs = {k: v.requires_grad_() for k, v in random_outputs(1).items()}
    losses = Criterion()(outputs, torch.zeros(1, 4))
    assert losses["loss_reg"] == 0 and losses["num_positive"] == 0
    losses["loss"].backward()
    assert outputs["boxes"].grad is not None and not outputs["boxes"].grad.any()
    assert outputs["score_map"].grad is not None and outputs["score_map"].grad.isfinite().all()


def test_score_targets_carry_no_gradient_to_the_boxes() -> None:
    outputs = random_outputs()
    boxes = outputs["boxes"].clone().requires_grad_()
    losses = Criterion(reg_weight=0.0)({**outputs, "boxes": boxes}, BOXES)
    losses["loss"].backward()
    assert boxes.grad is not None and not boxes.grad.any()


def test_loss_is_float32_for_half_precision_outputs() -> None:
    outputs = {k: v.half() for k, v in random_outputs().items()}
    assert Criterion()(outputs, BOXES)["loss"].dtype == torch.float32
