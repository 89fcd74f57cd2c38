"""Shared positions, token types and the order of the sequence."""

from __future__ import annotations

import torch

from lorat.model.embedding import TokenEmbedding, resize_position, template_position


def test_template_uses_the_top_left_of_the_search_grid() -> None:
    position = torch.arange(16.0).view(1, 16, 1)
    assert template_position(position, 2).flatten().tolist() == [0, 1, 4, 5]


def test_types_mark_background_foreground_and_search() -> None:
    embedding = TokenEmbedding(2)
    with torch.no_grad():
        embedding.token_type.copy_(torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
    mask = torch.tensor([[[0, 1], [0, 0]]])
    tokens = embedding(torch.zeros(1, 4, 2), torch.zeros(1, 9, 2), torch.zeros(1, 9, 2), mask)
    assert tokens[0, :, 0].tolist() == [1, 2, 1, 1] + [3] * 9


def test_a_fitting_grid_is_left_alone() -> None:
    position = torch.randn(1, 49, 5)
    assert resize_position(position, 7) is position
    assert resize_position(position, 4).shape == (1, 16, 5)


def test_constant_grids_stay_constant() -> None:
    resized = resize_position(torch.full((1, 81, 3), 0.7), 16)
    torch.testing.assert_close(resized, torch.full((1, 256, 3), 0.7))
