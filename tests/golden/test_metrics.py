"""Both dialects, per sequence and per data set, with every data set's conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorat.metrics import Evaluation, GroundTruth, evaluate
from tests.golden.fixture_files import golden, name_of

COVERS = ("*_metrics.npz",)
SETS = pytest.mark.parametrize("path", golden("*_metrics.npz"), ids=name_of)
TOLERANCE = {"atol": 1e-6, "rtol": 0}


def evaluated(data: Any, dialect: str, dataset: str = "") -> Evaluation:
    names = [f"s{k}" for k in range(int(data["num_sequences"]))]
    return evaluate(
        {name: data[f"{name}_pred_xyxy"] for name in names},
        {
            name: GroundTruth(boxes=data[f"{name}_gt_xyxy"], visible=data[f"{name}_visible"])
            for name in names
        },
        dialect=dialect,
        dataset=dataset,
        seconds={name: data[f"{name}_time_cost"] for name in names},
    )


def assert_curves(result: Any, data: Any, prefix: str) -> None:
    for curve in ("success_curve", "precision_curve", "norm_precision_curve"):
        np.testing.assert_allclose(getattr(result, curve), data[f"{prefix}_{curve}"], **TOLERANCE)


@SETS
def test_compatible_dialect(path: Path) -> None:
    data = np.load(path)
    for dataset in data["datasets"].tolist():
        result = evaluated(data, "compatible", dataset)
        columns = ("SUC", "P", "P_norm", "SR0.5", "SR0.75", "FPS")
        for name, sequence in result.sequences.items():
            prefix = f"compat_{dataset}_{name}"
            assert_curves(sequence, data, prefix)
            scores = [sequence.scores[c] for c in columns]
            np.testing.assert_allclose(scores, data[f"{prefix}_scores"], atol=1e-6, rtol=1e-9)
            np.testing.assert_allclose(sequence.frame_iou, data[f"{prefix}_frame_iou"], **TOLERANCE)
        mean = [result.scores[c] for c in columns]
        np.testing.assert_allclose(
            mean, data[f"compat_{dataset}_mean_scores"], atol=1e-6, rtol=1e-9
        )


@SETS
def test_plain_dialect(path: Path) -> None:
    data = np.load(path)
    for name, sequence in evaluated(data, "plain").sequences.items():
        prefix = f"plain_{name}"
        assert_curves(sequence, data, prefix)
        scores = sequence.scores
        np.testing.assert_allclose(
            [scores[c] for c in ("AO", "SR0.5", "SR0.75")],
            data[f"{prefix}_ao_sr50_sr75"],
            **TOLERANCE,
        )
        np.testing.assert_allclose(
            [scores[c] for c in ("SUC", "P", "P_norm", "FPS")],
            data[f"{prefix}_scores_success_prec_normprec_fps"],
            atol=1e-6,
            rtol=1e-9,
        )
        np.testing.assert_allclose(sequence.frame_iou, data[f"{prefix}_frame_iou"], **TOLERANCE)
