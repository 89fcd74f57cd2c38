"""The default tracker on real video that it has never seen, beside trackers that learn nothing."""

from __future__ import annotations

import numpy as np
import pytest

from lorat.tracking.baselines import baseline
from tests import real_data

pytestmark = pytest.mark.skipif(
    not (real_data.REAL_DATA / "baselines.json").is_file(), reason="the real sequences are not here"
)


def test_the_box_that_never_moves_is_measured_as_the_baselines_were() -> None:
    still = real_data.overlaps(baseline("static"))
    measured = real_data.baselines()["static"]
    assert np.mean(list(still.values())) == pytest.approx(measured, abs=5e-4)
