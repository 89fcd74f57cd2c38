"""The position grid is resampled and cut as published."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lorat.model.backbone import adapt_keys
from lorat.model.embedding import resize_position, template_position
from tests.golden.fixture_files import golden, name_of

COVERS = ("*_posembed.npz",)


@pytest.mark.parametrize("path", golden("*_posembed.npz"), ids=name_of)
def test_position_grid_and_template_slice(path: Path) -> None:
    io = np.load(path)
    full = adapt_keys({"pos_embed": torch.from_numpy(io["pos_embed_full"])})["pos_embed"]
    outputs = [name for name in io.files if re.fullmatch(r"out_\d+x\d+", name)]
    assert outputs
    for index, name in enumerate(outputs):
        resized = resize_position(full, int(name.rpartition("x")[2]))
        np.testing.assert_allclose(resized.numpy(), io[name], rtol=1e-5, atol=1e-5)
        if index == 0:
            cut = template_position(resized, int(io["template_slice_grid"]))
            expected = io["template_slice_of_first"]
            np.testing.assert_allclose(cut.numpy(), expected, rtol=1e-5, atol=1e-5)
