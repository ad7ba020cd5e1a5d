"""Charts as inline SVG.

The SVG of a plot is stretched to the width of the page, with lines of constant width. Labels are HTML, which is not
stretched: they are as large on a phone as on a screen. Points are the ends of lines without length.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from internvl.tools.report_page.text import format_number, format_ticks

WIDTH, HEIGHT = 1000.0, 300.0  # of the plot, in SVG units
NUM_COLORS = 8
NUM_COLUMNS = 500  # of a line: each shows its smallest and largest value
NUM_HOVERS = 100
MAX_DOTS = 40  # points of a line that are drawn as dots
LOG_RATIO = 20  # of the largest value to the median, above which an axis is logarithmic
ROUND_FACTORS = (1, 2, 2.5, 5, 10)


class Line(NamedTuple):
    """A curve by step.

    Attributes:
        x, y: (N,) ascending steps, and values; non-finite values are gaps.
        color: its number.
        is_faint: drawn behind, without an entry in the legend.
        low, high: (N,) of its band.
        is_area: the band from `low` to `y` is drawn instead of the curve; its height is the value.
        best: index of its best point.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    is_faint: bool = False
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    is_area: bool = False
    best: int | None = None

    @property
    def values(self) -> np.ndarray:
        """(N,) values to show as text."""
        return self.y - self.low if self.is_area and self.low is not None else self.y


class Axis(NamedTuple):
    """Values from `low` to `high` on a plot."""

    low: float
    high: float
    is_log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Return the share of the axis, 0 at its low end; non-finite values stay so."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.is_log:
                return np.log(values / self.low) / math.log(self.high / self.low)
            return (values - self.low) / (self.high - self.low)

    def list_ticks(self, count: int = 5) -> list[float]:
        """List round values, about `count`."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1, 2, 5) if last - first <= 2 else (1,)
            spacing = max(1, math.ceil((last - first) / count))
            ticks = [factor * 10.0**power for power in range(first, last + 1, spacing) for factor in factors]
        else:
            spacing = choose_spacing((self.high - self.low) / count)
            first, last = math.ceil(self.low / spacing - 1e-9), math.floor(self.high / spacing + 1e-9)
            ticks = [float(f"{number * spacing:.12g}") for number in range(first, last + 1)]
        return [tick for tick in ticks if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9) or tick == 0]


def choose_spacing(at_least: float) -> float:
    """Choose a round number that is not smaller."""
    magnitude = 10.0 ** math.floor(math.log10(at_least))
    return next(magnitude * factor for factor in ROUND_FACTORS if at_least <= magnitude * factor * (1 + 1e-9))


def choose_axis(values: np.ndarray, may_be_log: bool = True) -> Axis:
    """Choose the range of values, and a logarithmic axis where few of them are much larger than the others."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Axis(0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if may_be_log and low > 1e-30 * high > 0 and high > LOG_RATIO * float(np.median(values)):
        return Axis(low / 1.2, high * 1.2, is_log=True)
    if low >= 0 and low <= 0.6 * high:
        low = 0.0
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(0.0 if low == 0.0 else low - margin, high + margin)


def smooth(values: np.ndarray) -> np.ndarray:
    """Compute the bias-corrected exponential moving average over a fiftieth of the values, at least five.

    Non-finite values have no influence, and stay gaps.
    """
    weight = 1 - 1 / max(5.0, len(values) / 50)
    mean, total, smoothed = 0.0, 0.0, np.full(len(values), np.nan)
    for index, value in enumerate(values.tolist()):
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            total = weight * total + (1 - weight)
            smoothed[index] = mean / total
    return smoothed


def choose_points(x: np.ndarray, y: np.ndarray, num_columns: int = NUM_COLUMNS) -> np.ndarray:
    """Choose the points of a line to draw: the extremes of each column, and a gap of each that has one."""
    if len(x) <= 2 * num_columns:
        return np.arange(len(x))
    bounds = np.searchsorted(x, np.linspace(x[0], x[-1], num_columns + 1)[1:-1])
    chosen = [np.array([0, len(x) - 1])]
    for start, end in zip([0, *bounds], [*bounds, len(x)], strict=True):
        part = y[start:end]
        is_finite = np.isfinite(part)
        if is_finite.any():
            extremes = np.where(is_finite, part, np.nan)
            chosen.append(start + np.array([np.nanargmin(extremes), np.nanargmax(extremes)]))
        if not is_finite.all():
            chosen.append(start + np.flatnonzero(~is_finite)[:1])
    return np.unique(np.concatenate(chosen))


class Chart:
    """A chart of lines by step.

    Args:
        title, unit: of the values.
        lines: drawn in this order.
        marks: step -> text of a vertical line.
        max_step: end of the horizontal axis.
    """

    def __init__(
        self, title: str, unit: str, lines: Sequence[Line], max_step: int, marks: Mapping[int, str] | None = None
    ):
        self.title, self.unit, self.marks = title, unit, marks or {}
        self.lines = [line for line in lines if np.isfinite(line.y).any()]
        self.x_axis = Axis(0.0, float(max(1, max_step)))
        bands = [band for line in self.lines for band in (line.low, line.high) if band is not None]
        values = np.concatenate([np.zeros(0), *(line.y for line in self.lines), *bands])
        self.y_axis = choose_axis(values, may_be_log=not any(line.is_area for line in self.lines))

    def render(self, css_class: str = "", note: str = "") -> str:
        """Render a figure with legend and axes."""
        y_ticks = self.y_axis.list_ticks()
        y_places = (100 * (1 - self.y_axis.place(np.array(y_ticks)))).tolist()  # percent from the top
        x_ticks = [tick for tick in self.x_axis.list_ticks() if tick == int(tick)]
        grid = "".join(f"M0 {HEIGHT * place / 100:.1f}H{WIDTH:.0f}" for place in y_places)
        body = "".join(
            [
                f'<path class="grid" d="{grid}"/>',
                *(self.draw_mark(step, text) for step, text in self.marks.items()),
                *map(self.draw_band, self.lines),
                *map(self.draw_line, self.lines),
                self.draw_gaps(),
                *self.draw_hovers(),
            ]
        )
        y_labels = "".join(
            f'<span style="top:{place:.1f}%">{label}</span>'
            for place, label in zip(y_places, format_ticks(y_ticks), strict=True)
        )
        x_labels = "".join(
            f'<span style="left:{100 * tick / self.x_axis.high:.1f}%">{label}</span>'
            for tick, label in zip(x_ticks, format_ticks(x_ticks), strict=True)
        )
        scale = ", log scale" if self.y_axis.is_log else ""
        unit = f'<span class="soft">{escape(self.unit + scale).removeprefix(", ")}</span>'
        return (
            f'<figure class="chart {css_class}"><figcaption><b>{escape(self.title)}</b> {unit}'
            f'<span class="keys">{"".join(map(self.render_key, self.lines))}</span></figcaption>'
            f'<div class="plot"><div class="y">{y_labels}</div>'
            f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(self.title)} by step">{body}</svg>'
            f'<div class="name">step</div><div class="x">{x_labels}</div></div>{note}</figure>'
        )

    def render_key(self, line: Line) -> str:
        if line.is_faint:
            return ""
        last = "" if line.is_area else f" <b>{format_number(line.y[np.isfinite(line.y)][-1])}</b>"
        color = f'<i class="c c{line.color % NUM_COLORS}"></i>'
        return f'<span class="key">{color}{escape(line.label)}{last}</span>'

    def place(self, line: Line, y: np.ndarray, indices: np.ndarray) -> tuple[list[float], list[float]]:
        """Return SVG coordinates of points."""
        x, y = WIDTH * self.x_axis.place(line.x[indices]), HEIGHT * (1 - self.y_axis.place(y[indices]))
        return [*map(float, x)], [*map(float, y)]

    def draw_line(self, line: Line) -> str:
        """Draw a curve with its points, if they are few, and its best point."""
        if line.is_area:
            return ""
        color = f"c c{line.color % NUM_COLORS}"
        x, y = self.place(line, line.y, choose_points(line.x, line.y))
        is_drawn = [math.isfinite(value) for value in y]
        path, is_isolated = "", False
        for index, (px, py) in enumerate(zip(x, y, strict=True)):
            if is_drawn[index]:
                follows = index > 0 and is_drawn[index - 1]
                path += f"{'L' if follows else 'M'}{px:.1f} {py:.1f}"
                is_isolated |= not follows and (index + 1 == len(x) or not is_drawn[index + 1])
        svg = f'<path class="line {color} {"faint" if line.is_faint else ""}" d="{path}"/>'
        if (len(x) <= MAX_DOTS and not line.is_faint) or (is_isolated and len(x) <= 2 * NUM_COLUMNS):
            dots = "".join(f"M{px:.1f} {py:.1f}h0" for px, py in zip(x, y, strict=True) if math.isfinite(py))
            svg += f'<path class="dots {color}" d="{dots}"/>'
        if line.best is not None:
            [px], [py] = self.place(line, line.y, np.array([line.best]))
            point = f'd="M{px:.1f} {py:.1f}h0"/>'
            svg += f'<path class="ring {color}" {point}<path class="hole" {point}'
        return svg

    def draw_band(self, line: Line) -> str:
        """Draw the intervals of the points as one area; that of a single point as a bar."""
        high_values = line.y if line.is_area else line.high
        if line.low is None or high_values is None:
            return ""
        indices = np.flatnonzero(np.isfinite(line.low) & np.isfinite(high_values))
        if len(indices) > NUM_COLUMNS:
            indices = indices[np.linspace(0, len(indices) - 1, NUM_COLUMNS).astype(int)]
        x, low = self.place(line, line.low, indices)
        _, high = self.place(line, high_values, indices)
        color = f"c c{line.color % NUM_COLORS}"
        corners = [*zip(x, high, strict=True), *reversed([*zip(x, low, strict=True)])]
        area = "L".join(f"{px:.1f} {py:.1f}" for px, py in corners)
        if len(x) == 1:
            return f'<path class="bars {color}" d="M{x[0]:.1f} {low[0]:.1f}V{high[0]:.1f}"/>'
        return f'<path class="{"area" if line.is_area else "band"} {color}" d="M{area}z"/>' if area else ""

    def draw_mark(self, step: int, text: str) -> str:
        at = f"{WIDTH * step / self.x_axis.high:.1f}"
        return f'<path class="mark" d="M{at} 0V{HEIGHT:.0f}"><title>{escape(text)}</title></path>'

    def draw_gaps(self) -> str:
        """Draw a mark at the bottom for each column with a non-finite value."""
        places = set()
        for line in self.lines:
            if not line.is_faint or len(self.lines) == 1:
                steps = line.x[~np.isfinite(line.y)]
                places |= set(map(float, np.round(NUM_COLUMNS * self.x_axis.place(steps))))
        path = "".join(f"M{place * WIDTH / NUM_COLUMNS:.0f} {HEIGHT:.0f}v-14" for place in sorted(places))
        return f'<path class="gaps" d="{path}"><title>not finite</title></path>' if path else ""

    def draw_hovers(self) -> Iterable[str]:
        """Draw transparent columns whose titles show the values of a step."""
        if not self.lines:
            return
        steps = np.unique(np.concatenate([line.x for line in self.lines]))
        if len(steps) > NUM_HOVERS:
            steps = steps[np.linspace(0, len(steps) - 1, NUM_HOVERS).astype(int)]
        x = WIDTH * self.x_axis.place(steps.astype(float))
        borders = np.concatenate([[0.0], (x[1:] + x[:-1]) / 2, [WIDTH]])
        for step, start, end in zip(steps.tolist(), borders, borders[1:], strict=False):
            texts = [f"step {step:,}"]
            for line in self.lines:
                index = int(np.searchsorted(line.x, step))
                if index < len(line.x) and line.x[index] == step:
                    texts.append(
                        f"{line.label}: {format_number(float(line.values[index]))}{format_interval(line, index)}"
                    )
            title = escape("\n".join(texts))
            size = f'x="{start:.1f}" y="0" width="{end - start:.1f}" height="{HEIGHT:.0f}"'
            yield f"<rect {size}><title>{title}</title></rect>"


def format_interval(line: Line, index: int) -> str:
    """Format the band of a point, if it has one."""
    if line.low is None or line.high is None or not np.isfinite(line.low[index]):
        return ""
    return f" ({format_number(float(line.low[index]))} - {format_number(float(line.high[index]))})"
