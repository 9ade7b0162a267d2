"""Curves over steps as SVG elements."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from finetune.monitoring.plot import LOG_SCALE_FROM, SMOOTH_FROM, smoothed
from utils.reports.html import COLOURS, svg, svg_text

_DASHES = ("", "7 3", "2 3")  # tell lines apart where colours are used up
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 26, 10, 36  # margins in px
_MOST_POINTS = 1500  # of a drawn line; what is denser than pixels only makes the page heavy

Point = tuple[float, float | None]  # step and value; None where it was not finite


class Line(NamedTuple):
    """A curve; `number` is that of its run, which colours it, and `marked` ones have dots."""

    name: str
    points: Sequence[Point]
    number: int
    marked: bool = False


class Axis(NamedTuple):
    """From values to px: `low` stands at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    title: str,
    lines: Sequence[Line],
    size: tuple[int, int] = (520, 270),
    from_zero: bool = False,
    smooth: bool = False,
) -> str:
    """Curves over steps.

    Args:
        title: what screen readers say.
        lines: with at least one finite point among them.
        size: width and height in px.
        from_zero: the value axis begins at 0 and is linear; else it is logarithmic where values span much.
        smooth: long lines are drawn thin under their smoothed selves.
    """
    width, height = size
    values = [value for line in lines for _, value in line.points if value is not None]
    last = max(step for line in lines for step, _ in line.points)
    x = _linear_axis(0, max(1, last), _LEFT, width - _RIGHT, count=8, whole=True)
    y = _value_axis(values, height - _BOTTOM, _TOP, from_zero)
    parts = list(_draw_axes(x, y, width))
    long = [smooth and len(line.points) > SMOOTH_FROM for line in lines]
    parts += [_draw_faintly(line, x, y) for line, is_long in zip(lines, long) if is_long]
    for line, is_long in zip(lines, long):
        parts += _draw_line(_smoothed(line) if is_long else line, x, y)
    return svg(title, width, height, parts)


def swatch(number: int) -> str:
    """A piece of the line of a run, for a legend."""
    return f'<svg class="swatch" viewBox="0 0 30 8" aria-hidden="true"><path d="M0 4H30" {_stroke(number, 3)}/></svg>'


def number_text(value: float) -> str:
    """A number of an axis or a tooltip, in few characters."""
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _value_axis(values: Sequence[float], start: float, end: float, from_zero: bool) -> Axis:
    low, high = min(values), max(values)
    if not from_zero and low > 0 and high / low > LOG_SCALE_FROM:
        return Axis(low, high, start, end, _log_ticks(low, high), log=True)
    low = min(0.0, low) if from_zero else low
    if low == high:
        low, high = low if from_zero else low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return _linear_axis(low, high, start, end, count=5, rounded=True)


def _linear_axis(
    low: float, high: float, start: float, end: float, count: int, whole: bool = False, rounded: bool = False
) -> Axis:
    """Ticks at 1, 2 or 5 times a power of ten, about `count`; `rounded` ends at ticks, `whole` has no halves."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= count)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [float(f"{index * step:.12g}") for index in range(first, last + 1)]
    if rounded:
        return Axis(ticks[0], ticks[-1], start, end, ticks)
    return Axis(low, high, start, end, [tick for tick in ticks if low <= tick <= high])


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) <= 8:
            break
    return ticks[:: 1 + len(ticks) // 9]


def _draw_axes(x: Axis, y: Axis, width: float) -> Iterator[str]:
    for tick in y.ticks:
        place = y.place(tick)
        yield f'<path d="M{_LEFT} {place:.1f}H{width - _RIGHT}" stroke="#ddd"/>'
        yield svg_text(_LEFT - 7, place + 4, number_text(tick), "end")
    yield f'<path d="M{_LEFT} {y.start}H{width - _RIGHT}" stroke="#888"/>'
    for tick in x.ticks:
        yield f'<path d="M{x.place(tick):.1f} {y.start}v4" stroke="#888"/>'
        yield svg_text(x.place(tick), y.start + 17, f"{tick:,.0f}", "middle")
    yield svg_text((_LEFT + width - _RIGHT) / 2, y.start + 32, "step", "middle")


def _draw_line(line: Line, x: Axis, y: Axis) -> Iterator[str]:
    name = f"<title>{escape(line.name)}</title>"
    width = 1.2 if line.marked else 1.8
    yield f'<path d="{_path(line.points, x, y)}" {_stroke(line.number, width)}>{name}</path>'
    colour = COLOURS[line.number % len(COLOURS)]
    for step, value in line.points:
        where = f"{escape(line.name)}, step {step:,.0f}"
        if value is None:
            cross = f"M{x.place(step) - 4:.1f} {y.start - 8}l8 8m0 -8l-8 8"
            yield f'<path d="{cross}" stroke="{colour}"><title>{where}: not finite</title></path>'
        elif line.marked or len(line.points) == 1:
            centre = f'cx="{x.place(step):.1f}" cy="{y.place(value):.1f}"'
            yield f'<circle {centre} r="3.2" fill="{colour}"><title>{where}: {number_text(value)}</title></circle>'


def _draw_faintly(line: Line, x: Axis, y: Axis) -> str:
    return f'<path d="{_path(line.points, x, y)}" {_stroke(line.number, 0.8)} opacity=".35"/>'


def _smoothed(line: Line) -> Line:
    """The line with moving averages for its finite values."""
    steps, values = zip(*line.points)
    means = smoothed(np.array([math.nan if value is None else value for value in values])).tolist()
    return line._replace(points=[(step, None if math.isnan(mean) else mean) for step, mean in zip(steps, means)])


def _stroke(number: int, width: float) -> str:
    dash = _DASHES[number // len(COLOURS) % len(_DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="{width}"{dashes} fill="none"'


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """SVG's words for a line; it is interrupted where a value is not finite."""
    pieces, pen = [], "M"
    for step, value in _thinned(points):
        if value is None:
            pen = "M"
        else:
            pieces.append(f"{pen}{x.place(step):.1f} {y.place(value):.1f}")
            pen = "L"
    return "".join(pieces)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """The lowest and the highest point of each of many stretches, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    stretch = -(-2 * len(points) // _MOST_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        finite = [point for point in points[start : start + stretch] if point[1] is not None]
        if finite:
            ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
            kept += sorted(ends)
    return kept
