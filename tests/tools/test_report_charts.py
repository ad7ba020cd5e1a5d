"""Charts of the report: any number of points, gaps, ranges and ticks."""

import re

import numpy as np
import pytest

from internvl.tools.report_page.charts import (
    NUM_COLUMNS,
    NUM_HOVERS,
    Axis,
    Chart,
    Line,
    choose_axis,
    choose_points,
    smooth,
)
from internvl.tools.report_page.text import format_count, format_duration, format_number, format_ticks


def draw(y, x=None, **values) -> str:
    y = np.array(y, np.float64)
    x = np.arange(1, len(y) + 1) if x is None else np.array(x)
    return Chart("Loss", "", [Line("loss", x, y, **values)], int(x.max())).render()


def read_path(svg: str, css_class: str) -> list[tuple[float, float]]:
    """Return the points of the first path of a class."""
    [path] = re.findall(rf'<path class="{css_class} [^"]*" d="([^"]*)"', svg)[:1]
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.-]+) ([\d.-]+)", path)]


def test_points_are_at_their_values():
    points = read_path(draw([0.0, 1.0, 2.0, 4.0], x=[25, 50, 75, 100]), "line")
    assert [x for x, _ in points] == [250, 500, 750, 1000]
    heights = [300 - y for _, y in points]
    assert heights[0] == 0
    assert np.allclose(np.array(heights[1:]) / heights[1], [1, 2, 4], atol=0.01)


def test_one_point_is_a_dot_with_its_interval():
    svg = draw([0.5], low=np.array([0.25]), high=np.array([0.75]))
    assert len(read_path(svg, "dots")) == 1 and len(read_path(svg, "bars")) == 1
    assert "loss: 0.5 (0.25 - 0.75)" in svg


def test_long_curves_keep_their_extremes():
    values = np.random.default_rng(0).normal(10, 1, 100_000)
    values[[12_345, 77_777]] = 0.5, 30.0
    chosen = choose_points(np.arange(len(values)), values)
    assert {12_345, 77_777, 0, len(values) - 1} <= set(chosen.tolist())
    assert len(chosen) <= 2 * NUM_COLUMNS + 2
    svg = draw(values)
    assert len(svg) < 60_000 and svg.count("<rect") == NUM_HOVERS


@pytest.mark.parametrize("gap", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_gaps(gap):
    svg = draw([1.0, 2.0, gap, 2.0, gap, 1.0, 1.5])
    [path] = re.findall(r'<path class="line [^"]*" d="([^"]*)"', svg)
    assert path.count("M") == 3 and path.count("L") == 2
    assert 'class="gaps"' in svg and "NaN" not in path and "inf" not in path
    long = np.ones(50_000)
    long[31_000] = gap
    assert draw(long).count("not finite") == 1


@pytest.mark.parametrize("values", [[np.nan], [0.0, 0.0], [-1.0], [1e-300], [1e300, -1e300], [5.0] * 3])
def test_odd_values_have_a_chart(values):
    svg = draw(values)
    assert "nan" not in svg.lower().replace("not finite", "")


def test_axis_is_logarithmic_where_few_values_are_large():
    assert choose_axis(np.array([1.0, 1.1, 1.2, 900.0])).is_log
    assert not choose_axis(np.array([1.0, 1.1, 1.2, 9.0])).is_log
    assert not choose_axis(np.array([0.0, 1.1, 1.2, 900.0])).is_log, "zero has no logarithm"
    svg = draw([1.0, 10.0, 1.0, 1000.0])
    assert "log scale" in svg
    heights = [300 - y for _, y in read_path(svg, "line")]
    assert (heights[3] - heights[0]) / (heights[1] - heights[0]) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("low", [0.0, -3.0, 0.9, 0.99999])
@pytest.mark.parametrize("size", [1e-12, 0.013, 1.0, 7.0, 12_345.0, 1e15])
def test_ticks_are_few_and_distinct(low, size):
    ticks = Axis(low * size, size).list_ticks()
    labels = format_ticks(ticks)
    assert 2 <= len(ticks) <= 8 and len(set(labels)) == len(labels)
    assert low == 0.99999 or all(len(label) <= 7 for label in labels)


@pytest.mark.parametrize("high", [30.0, 5e3, 1e9, 1e30])
def test_ticks_of_a_logarithmic_axis(high):
    assert 2 <= len(Axis(0.9, high, is_log=True).list_ticks()) <= 8


def test_smoothed_curve_is_the_bias_corrected_average():
    assert smooth(np.array([4.0])) == [4.0]
    assert smooth(np.array([1.0, 2.0])) == pytest.approx([1.0, (0.8 * 0.2 * 1 + 0.2 * 2) / (0.8 * 0.2 + 0.2)])
    assert np.isnan(smooth(np.array([1.0, np.nan, 1.0]))).tolist() == [False, True, False]
    assert smooth(np.full(300, 2.5)) == pytest.approx(np.full(300, 2.5))


def test_numbers_as_text():
    values = (0.0, 3.0, 1234567, 0.123456, 12.3456, 0.00012345, 123456.7, float("nan"), float("inf"))
    texts = ["0", "3", "1,234,567", "0.1235", "12.35", "0.000123", "123,457", "NaN", "∞"]
    assert list(map(format_number, values)) == texts
    assert format_ticks([0, 0.25, 2500, 20_000, 1.5e6, 1e-5]) == ["0", "0.25", "2500", "20k", "1.5M", "1e-5"]
    assert format_ticks([1.0, 1.00001]) == ["1", "1.00001"]
    assert [format_count(value) for value in (12, 98_304, 7.6e9)] == ["12", "98.3k", "7.6G"]
    seconds = [45, 600, 8000, 300_000, float("nan")]
    assert list(map(format_duration, seconds)) == ["45 s", "10 min", "2 h 13 min", "3 d 11 h", "unknown"]
