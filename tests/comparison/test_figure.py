"""The figure shows the numbers of the comparison."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from esper_lightning.comparison import figure
from tests.comparison.conftest import KILLED
from tests.comparison.test_scores import FAST, comparison, pairs


@pytest.fixture
def drawn(make_run, tmp_path, monkeypatch):
    """The comparison of two variants, one of whose runs died, and its axes."""
    figures = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    died = make_run("fast/9", seed=9, settings=FAST, returns=[1, 2, 3], crash=KILLED)
    result = comparison(*pairs(make_run), make_run("base/9", seed=9), died)
    figure.draw(result, tmp_path / "comparison.png")
    return result, figures[0].axes


def test_curves_lie_within_their_intervals(drawn):
    result, (curves, *_) = drawn
    bands = dict(zip(result.curves, curves.collections, strict=True))
    lines = {line.get_label().rpartition(" (")[0]: line for line in curves.lines}
    for name, curve in result.curves.items():
        line = lines[name]
        assert (list(line.get_xdata()), list(line.get_ydata())) == (curve.env_steps, curve.value)
        corners = {tuple(corner) for corner in bands[name].get_paths()[0].vertices}
        for end in (curve.low, curve.high):
            assert set(zip(curve.env_steps, end, strict=True)) <= corners
    assert len({to_hex(lines[name].get_color()) for name in result.curves}) == 2


def test_a_run_that_died_ends_with_a_cross(drawn):
    _, (curves, *_) = drawn
    crosses = [line for line in curves.lines if line.get_marker() == "X" and len(line.get_xdata())]
    assert [(*cross.get_xdata(), *cross.get_ydata()) for cross in crosses] == [(3000, 3)]


def test_scores_are_plotted_at_the_places_of_the_comparison(drawn):
    result, (_, *panels) = drawn
    assert len(panels) == len(result.places) == 2
    for axes, place in zip(panels, result.places, strict=True):
        assert f"{place.env_steps:,}" in axes.get_title()
        bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
        expected = [row.interquartile_mean for row in place.rows]
        assert bars == [pytest.approx((row.low, row.high)) for row in expected]
        points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert points == [row.value for row in expected]
