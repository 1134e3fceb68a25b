"""Line charts as SVG, small enough to be written out: a report is one file without scripts or network.

Colours come from the page (classes `line-1`, `line-2`, …), so that the same picture works in light and dark. A plotting
library would bring 10 MB of dependencies and pictures of 50 KB that know one background.

    >>> line_chart([Series("training", [(1, 2.3), (2, 1.9)])], "loss")
    Markup('<svg viewBox="0 0 420 220" ...')
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]  # step, value
WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26  # room for the numbers on the axes
INSET = 14  # of the first and the last of a few values, so that their numbers fit
MOST_POINTS = 240  # more cannot be seen in 420 pixels
LOGARITHMIC = 50  # ratio of largest and smallest value from which equal steps mean equal factors
SMOOTHED_FROM = 40  # points


@dataclass(frozen=True)
class Series:
    """A named curve. `smooth`: also a moving average, with the values themselves faint behind it."""

    name: str
    points: Sequence[Point]
    smooth: bool = False


@dataclass(frozen=True)
class Along:
    """What runs along the bottom. `values`: the only ones there are, drawn equal factors apart."""

    word: str = "step"
    over: str = "over the steps of the run"
    values: Sequence[float] = ()

    def scale(self, first: float, last: float) -> "Scale":
        """The horizontal scale."""
        if self.values and 0 < first < last:
            return Scale(first, last, LEFT + INSET, WIDTH - RIGHT - INSET, logarithmic=True)
        return Scale(min(first, last - 1), last, LEFT, WIDTH - RIGHT)

    def ticks(self, x: "Scale") -> list[float]:
        """Numbers written below."""
        return list(self.values) or [value for value in x.ticks() if value == int(value)]


@dataclass(frozen=True)
class Scale:
    """Values to pixels along one axis, and the numbers written on it."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        value, low, high = (math.log10(each) if self.logarithmic else each for each in (value, self.low, self.high))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round numbers within the scale, about five."""
        if self.logarithmic:
            decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            every = math.ceil(len(decades) / 5) or 1
            found = [10.0**power for power in decades[::every]]
            if len(found) >= 3:
                return found
            return [
                value
                for each in [10.0 ** (decades[0] - 1), *found]
                for m in (1, 2, 5)
                if self.low <= (value := each * m) <= self.high
            ]
        step = round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(step: float) -> float:
    """The number of 1, 2, 2.5, 5 × 10ⁿ that is just above `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= step * 0.999)


def value_scale(values: Sequence[float], from_zero: bool) -> Scale:
    """The vertical scale, in factors where values differ by orders of magnitude and 0 is not asked for."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOGARITHMIC and not from_zero:
        return Scale(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, logarithmic=True)
    if low >= 0 and (from_zero or low < 0.5 * high):
        low = 0.0
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low if low == 0 else low - room, high + room, HEIGHT - BOTTOM, TOP)


def line_chart(series: Sequence[Series], unit: str, from_zero: bool = False, along: Along = Along()) -> Markup:
    """The curves over the steps of a run, or what `along` says; empty when there is nothing to draw.

    Values that are not finite are left out.
    """
    curves = [(each, [point for point in each.points if math.isfinite(point[1])]) for each in series]
    points = [point for _, finite in curves for point in finite]
    if not points:
        return Markup("")
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    x = along.scale(first, last)
    y = value_scale([value for _, value in points], from_zero)
    drawn = (part for n, curve in enumerate(curves, 1) for part in draw(*curve, n, x, y, along.word))
    parts = [*axes(x, y, along), *drawn]
    names = " and ".join(each.name for each in series)
    label = escape(f"{names}, {unit}, {along.over}")
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def axes(x: Scale, y: Scale, along: Along) -> list[str]:
    """Grid lines with their numbers."""
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{number(value)}</text>')
    for value in along.ticks(x):
        parts.append(f'<text x="{x.at(value)}" y="{HEIGHT - 8}" text-anchor="middle">{number(value)}</text>')
    return parts


def draw(series: Series, points: Sequence[Point], number_of: int, x: Scale, y: Scale, word: str) -> list[str]:
    """One curve; few points are marked, and tell their value when pointed at."""
    shown = thin(points)
    parts = []
    if series.smooth and len(points) >= SMOOTHED_FROM:
        parts.append(polyline(shown, f"line-{number_of} faint", x, y))
        shown = thin(smooth(points))
    parts.append(polyline(shown, f"line-{number_of}", x, y))
    if len(points) <= SMOOTHED_FROM:
        name = escape(series.name)
        parts += [
            f'<circle class="dot-{number_of}" cx="{x.at(step)}" cy="{y.at(value)}" r="2.5">'
            f"<title>{name} {value:.4g} at {word} {step:g}</title></circle>"
            for step, value in points
        ]
    return parts


def polyline(points: Sequence[Point], name: str, x: Scale, y: Scale) -> str:
    """Points joined by straight lines."""
    path = " ".join(f"{x.at(step)},{y.at(value)}" for step, value in points)
    return f'<polyline class="{name}" points="{path}"/>'


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS: means of as many neighbours as needed."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a twentieth of the points, unbiased at the start."""
    keep = 1 - 1 / max(2, len(points) / 20)
    total = weight = 0.0
    averaged = []
    for step, value in points:
        total, weight = total * keep + value, weight * keep + 1
        averaged.append((step, total / weight))
    return averaged


def number(value: float) -> str:
    """A number for an axis: 0, 0.25, 1,500, 2e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
