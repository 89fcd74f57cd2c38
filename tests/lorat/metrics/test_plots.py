"""Plots show what they were given."""

from __future__ import annotations

import cv2
import numpy as np

from lorat.metrics import plots


def decoded(figure) -> np.ndarray:
    data = plots.png(figure)
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def test_curves_have_their_thresholds_and_are_ranked_by_score() -> None:
    worse, better = np.linspace(0.6, 0, 21), np.linspace(0.9, 0, 21)
    figure = plots.success_plot({"worse": (worse, 0.3), "better": (better, 0.45)}, "on x")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "better  0.450",
        "worse  0.300",
    ]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), np.linspace(0, 1, 21))
    np.testing.assert_allclose(axes.lines[0].get_ydata(), better)
    assert decoded(figure).std() > 5


def test_precision_axis_is_pixels_or_box_sides() -> None:
    curves = {"a": (np.linspace(0, 1, 51), 0.4)}
    assert plots.precision_plot(curves, "").axes[0].get_xlim()[1] == 50
    assert plots.precision_plot(curves, "", normalized=True).axes[0].get_xlim()[1] == 0.5


def test_sequences_are_sorted_and_named() -> None:
    axes = plots.sequence_plot({"b": 0.9, "a": 0.1}, "").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_many_sequences_have_no_room_for_names() -> None:
    axes = plots.sequence_plot({f"s{i}": i / 300 for i in range(300)}, "").axes[0]
    assert axes.get_ylabel() == "300 sequences"


def test_radar_closes() -> None:
    scores = {"one": {"a": 0.2, "b": 0.5, "c": 0.9}, "two": {"a": 0.1, "b": 0.2, "c": 0.3}}
    figure = plots.attribute_radar(scores, "")
    line = figure.axes[0].lines[0]
    assert list(line.get_ydata()) == [0.2, 0.5, 0.9, 0.2]


def test_comparison_and_timeline_are_drawn() -> None:
    rng = np.random.default_rng(0)
    figure = plots.comparison_plot(
        rng.normal(0, 1, 30), rng.normal(0, 0.1, 500), (-0.2, 0.2), "a against b"
    )
    assert decoded(figure).std() > 5
    timeline = plots.overlap_timeline({"s": np.array([1.0, -1.0, 0.5])}, "")
    assert np.isnan(timeline.axes[0].lines[0].get_ydata()[1])
