"""Plots show what they were given."""

from __future__ import annotations

import cv2
import numpy as np
from matplotlib.colors import to_hex

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


def test_a_tracker_has_its_colour_in_every_plot_of_a_comparison() -> None:
    worse, better = np.linspace(0.6, 0, 21), np.linspace(0.9, 0, 21)
    names = [f"t{number}" for number in range(9)]
    curves = {name: (better if name == "t3" else worse, 0.1 * (name == "t3")) for name in names}
    lines = plots.success_plot(curves, "").axes[0].lines
    by_name = {line.get_label().split()[0]: line for line in lines}
    assert lines[0] is by_name["t3"], "the best comes first"
    scores = {name: {"fast": 0.2, "small": 0.4} for name in names}
    bars = plots.attribute_bars(scores, {"fast": 3, "small": 1}, "").axes[0]
    for name, container in zip(names, bars.containers, strict=True):
        assert [bar.get_width() for bar in container] == [0.2, 0.4]
        assert to_hex(container[0].get_facecolor()) == by_name[name].get_color()
    assert [label.get_text() for label in bars.get_yticklabels()] == ["fast (3)", "small (1)"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names)


def test_the_parts_of_a_gap_are_put_end_to_end() -> None:
    figure = plots.gap_plot([("a", 0.1), ("b", -0.03), ("left", 0.02)], [0.3, -0.1], "")
    bars = figure.axes[0].patches
    np.testing.assert_allclose([bar.get_x() for bar in bars], [0, 0.1, 0.07, 0], atol=1e-12)
    np.testing.assert_allclose([bar.get_width() for bar in bars], [0.1, -0.03, 0.02, 0.09])
