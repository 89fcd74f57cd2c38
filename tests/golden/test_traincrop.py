"""Jittered crops, and how much randomness each consumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorat.image.crops import jittered_crop_params
from tests.golden.fixture_files import golden, name_of

COVERS = ("*_traincrop.npz",)


@pytest.mark.parametrize("path", golden("*_traincrop.npz"), ids=name_of)
def test_jitter_and_its_random_stream(path: Path) -> None:
    data = np.load(path)
    for number, box in enumerate(data["boxes"].tolist()):
        rng = np.random.Generator(np.random.PCG64((int(data["rng_seed"]), number)))
        params, accepted = jittered_crop_params(
            tuple(box),
            float(data["area_factor"]),
            int(data["output_size"]),
            rng,
            scale_jitter=float(data["scale_jitter"]),
            translation_jitter=float(data["translation_jitter"]),
            min_object_size=float(data["min_object_size"]),
        )
        assert accepted == data["success"][number]
        np.testing.assert_allclose(
            np.reshape(params, (2, 2)), data["params"][number], rtol=1e-6, atol=1e-9
        )
        assert rng.random() == data["next_uniform_after"][number]
