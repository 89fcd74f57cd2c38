"""The head's depth, initial weights and outputs."""

from __future__ import annotations

import pytest
import torch

from lorat.model.head import Head


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_depth_is_the_number_of_linear_layers(depth: int) -> None:
    head = Head(16, depth)
    for mlp, outputs in ((head.cls_mlp, 1), (head.reg_mlp, 4)):
        shapes = [tuple(layer.weight.shape) for layer in mlp.layers]
        assert shapes == [(16, 16)] * (depth - 1) + [(outputs, 16)]
    outputs = head(torch.randn(2, 9, 16))
    assert outputs["score_map"].shape == (2, 3, 3)
    assert outputs["boxes"].shape == (2, 3, 3, 4)


def test_initial_weights_are_small_and_biases_zero() -> None:
    torch.manual_seed(0)
    head = Head(256)
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.numel() > 10_000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)


def test_boxes_surround_the_cell_centres() -> None:
    boxes = Head(16)(torch.randn(2, 27 * 27, 16))["boxes"]
    centre = (torch.arange(27) + 0.5) / 27
    for axis, line in ((0, centre[None, :]), (1, centre[:, None])):
        assert (boxes[..., axis] <= line).all() and (boxes[..., axis] >= line - 1).all()
        assert (boxes[..., axis + 2] >= line).all() and (boxes[..., axis + 2] <= line + 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_exact_centres(dtype: torch.dtype) -> None:
    head = Head(16).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    outputs = head(torch.zeros(1, 27 * 27, 16, dtype=dtype))
    assert outputs["boxes"].dtype == outputs["score_map"].dtype == torch.float32
    expected = (torch.arange(27) + 0.5) / 27
    assert torch.equal(outputs["boxes"][0, 0, :, 2] - 0.5, expected + 0.5 - 0.5)
