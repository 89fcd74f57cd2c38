"""The default tracker on real video that it has never seen, beside trackers that learn nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorat.config.training import TrainConfig, resolve
from lorat.model.network import build_model
from lorat.tracking.baselines import baseline
from lorat.tracking.tracker import Tracker
from tests import real_data

pytestmark = pytest.mark.skipif(
    not (real_data.REAL_DATA / "baselines.json").is_file(), reason="the real sequences are not here"
)


def test_the_default_tracker_beats_trackers_that_learn_nothing_before_it_is_adapted() -> None:
    """The head comes with the shipped backbone, so the model tracks as it is built."""
    config = resolve(TrainConfig(adaptation="full"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        overlaps = real_data.overlaps(Tracker(build_model(config)))
    finally:
        torch.set_num_threads(threads)
    measured = real_data.baselines()
    overlap = float(np.mean(list(overlaps.values())))
    print({name: round(value, 3) for name, value in overlaps.items()}, measured)
    assert len(overlaps) == 10
    assert overlap > measured["static"] + 0.1
    assert overlap > measured["KCF"] + 0.05
    assert overlap > measured["MIL"]


def test_the_box_that_never_moves_is_measured_as_the_baselines_were() -> None:
    still = real_data.overlaps(baseline("static"))
    measured = real_data.baselines()["static"]
    assert np.mean(list(still.values())) == pytest.approx(measured, abs=5e-4)
