"""Charts for HTML pages: SVG elements drawn with matplotlib.

Every color is a CSS variable, so that one chart serves light and dark pages; `CSS_COLORS` has their values. A chart is
`WIDTH` units wide, about as wide as a phone, and its text has the size of small print at that width.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from finetune.monitoring.plot import BAD, EVAL, LOG_SCALE_FROM, LR, SMOOTH_FROM, TRAIN, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDTH = 380
_CURVE_FROM = 3  # points of a marked line
DASHES = ("solid", "dashed", "dotted")  # distinguish lines once every color is used
_PAGE, _TEXT, _MUTED, _GRID, _AXIS = "#ffffff", "#1c2126", "#59666f", "#e4e8eb", "#a3aeb6"
_SERIES = (TRAIN, EVAL, "#2a8a5c", "#7a4fa3", "#a07800", LR)
# CSS variable -> its color on a light page, which is also what matplotlib draws, and on a dark one.
CSS_COLORS = {
    "page": (_PAGE, "#15191c"),
    "panel": ("#f5f7f8", "#1d2327"),
    "text": (_TEXT, "#e6e9ec"),
    "muted": (_MUTED, "#a0abb4"),
    "grid": (_GRID, "#30373d"),
    "axis": (_AXIS, "#5d6870"),
    "bad": (BAD, "#ff7b72"),
    **{
        f"series-{number}": colors
        for number, colors in enumerate(
            zip(_SERIES, ("#6cb0ea", "#f59463", "#5fc492", "#c09be6", "#dcb94a", "#a9bac3"), strict=True)
        )
    },
}

Point = tuple[float, float | None]  # step and value; None: not finite


class Line(NamedTuple):
    """A curve; `series` selects color and dash.

    `marked` draws a dot at each point, and the curve only from three points on: a line between two would suggest a
    course that was not measured.
    """

    name: str
    points: Sequence[Point]
    series: int
    marked: bool = False


class Bar(NamedTuple):
    """A value between 0 and 1 and its interval."""

    value: float
    low: float
    high: float


class BarGroup(NamedTuple):
    """Bars of one name, one for each series; None where a series has none."""

    name: str
    detail: str  # follows the name, in gray
    bars: Sequence[Bar | None]


class Figure(NamedTuple):
    """A chart with its caption, as templates show it."""

    title: str
    detail: str  # unit or explanation; may be empty
    svg: Markup


def number_text(value: float) -> str:
    """Return a number in few characters, for axes and tables."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def line_chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    from_zero: bool = False,
    smooth: bool = False,
    height: int = 250,
    unit: str = "step",
) -> Markup:
    """Return curves over steps as an SVG element.

    Args:
        name: of letters and digits, unique in the page.
        title: read out by screen readers.
        lines: at least one of which has a finite value.
        from_zero: start the value axis at 0 and keep it linear; otherwise it is logarithmic for a wide range of values.
        smooth: draw long lines thin under a moving average.
        height: in units of `WIDTH`.
        unit: what a step is called.
    """
    with _drawing(name, height) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        tips: dict[str, list[str]] = {}
        for number, line in enumerate(lines):
            _draw_line(axes, line, smooth and len(line.points) > SMOOTH_FROM, f"tip{number}", tips, unit)
        values = [value for line in lines for _, value in line.points if value is not None]
        _scale_values(axes, min(values), max(values), from_zero)
        _mark_not_finite(axes, lines, tips)
        _scale_steps(axes, max(step for line in lines for step, _ in line.points), unit)
        _tidy(axes, "y", kept_spine="bottom")
        return _svg(figure, name, title, tips)


@contextlib.contextmanager
def _drawing(name: str, height: float) -> Iterator[Canvas]:
    """Yield a figure whose points are units of the SVG element; draw and save it inside the block."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 12}):
        yield Canvas(figsize=(WIDTH / 72, height / 72))


def _tidy(axes: Axes, grid: Literal["x", "y"], kept_spine: str) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side == kept_spine)
        spine.set_color(_AXIS)
    axes.grid(axis=grid, color=_GRID, linewidth=1)
    axes.tick_params(which="both", length=0, labelcolor=_MUTED)
    axes.set_axisbelow(True)


def _draw_line(axes: Axes, line: Line, smooth: bool, tip: str, tips: dict[str, list[str]], unit: str) -> None:
    steps = np.array([step for step, _ in line.points], dtype=float)
    values = np.array([math.nan if value is None else value for _, value in line.points], dtype=float)
    color = _SERIES[line.series % len(_SERIES)]
    dash = DASHES[line.series // len(_SERIES) % len(DASHES)]
    if smooth:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
        values = smoothed(values)
    if not line.marked or len(values) >= _CURVE_FROM:
        tips[tip] = [line.name]
        axes.plot(steps, values, color=color, linewidth=1.3 if line.marked else 2, linestyle=dash, gid=tip)
    if line.marked or len(values) == 1:
        finite = [(step, value) for step, value in line.points if value is not None]
        tips[f"{tip}dots"] = [f"{line.name}, {unit} {step:,.0f}: {number_text(value)}" for step, value in finite]
        axes.plot(
            *zip(*finite), color=color, linestyle="none", marker="o", markersize=5.5, clip_on=False, gid=f"{tip}dots"
        )


def _mark_not_finite(axes: Axes, lines: Sequence[Line], tips: dict[str, list[str]]) -> None:
    """Mark the steps of values that are not finite with a cross above the step axis."""
    found = [(step, line.name) for line in lines for step, value in line.points if value is None]
    if found:
        tips["tipbad"] = [f"{name}, step {step:,.0f}: not finite" for step, name in found]
        at_bottom = axes.get_xaxis_transform()  # x in steps, y from 0 to 1
        steps, heights = [step for step, _ in found], [0.03] * len(found)
        axes.plot(steps, heights, "x", color=BAD, markersize=7, transform=at_bottom, gid="tipbad")


def _scale_values(axes: Axes, low: float, high: float, from_zero: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if not from_zero and low > 0 and high / low > LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.set_ylim(low * 0.9 or low, high * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,), numticks=9))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        if from_zero:
            low = min(0.0, low)
        if low == high:
            low, high = low if from_zero else low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        margin = 0.04 * (high - low)
        axes.set_ylim(low if from_zero else low - margin, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))


def _scale_steps(axes: Axes, last: float, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlim(0, max(1, last) * 1.02)  # room for a dot at the last step
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(unit, color=_MUTED)


class Curve(NamedTuple):
    """A curve of shares: both axes go from 0 to 1."""

    name: str
    points: Sequence[tuple[float, float]]
    series: int
    dots: Sequence[str] = ()  # the tooltip of each point, drawn as dots; () draws the curve alone


def share_chart(
    name: str,
    title: str,
    curves: Sequence[Curve],
    axes_names: tuple[str, str],
    diagonal: bool = False,
) -> Markup:
    """Return curves of shares as an SVG element.

    Args:
        name: of letters and digits, unique in the page.
        title: read out by screen readers.
        curves: with at least one point each.
        axes_names: what is on the horizontal and on the vertical axis.
        diagonal: whether to draw the line of equal shares.
    """
    with _drawing(name, 300) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        tips: dict[str, list[str]] = {}
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_AXIS, linewidth=1)
        for number, curve in enumerate(curves):
            color = _SERIES[curve.series % len(_SERIES)]
            tips[f"tip{number}"] = [curve.name]
            axes.plot(*zip(*curve.points), color=color, linewidth=1.3 if curve.dots else 2, gid=f"tip{number}")
            if curve.dots:
                tips[f"tip{number}dots"] = list(curve.dots)
                x, y = zip(*curve.points)
                axes.plot(x, y, "o", color=color, markersize=5.5, clip_on=False, gid=f"tip{number}dots")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        for axis, axis_name in zip((axes.xaxis, axes.yaxis), axes_names):
            axis.set_label_text(axis_name, color=_MUTED)
        _tidy(axes, "y", kept_spine="bottom")
        return _svg(figure, name, title, tips)


_LABEL, _BAR, _GAP, _AXIS_HEIGHT, _MARGIN = 19, 9, 13, 22, 6  # heights of a group's parts, and the sides' width


def bar_chart(name: str, title: str, groups: Sequence[BarGroup]) -> Markup:
    """Return horizontal bars from 0 to 1 with their intervals as an SVG element.

    Args:
        name: of letters and digits, unique in the page.
        title: read out by screen readers.
        groups: from top to bottom, with equally many bars each.
    """
    pitch = _LABEL + max(len(group.bars) for group in groups) * _BAR + _GAP
    bottom = len(groups) * pitch
    height = bottom + _AXIS_HEIGHT
    with _drawing(name, height) as figure:
        place = (_MARGIN / WIDTH, _AXIS_HEIGHT / height, 1 - 2 * _MARGIN / WIDTH, bottom / height)
        axes = figure.add_axes(place)
        axes.set(xlim=(0, 1), ylim=(bottom, 0), yticks=[])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        tips: dict[str, list[str]] = {}
        for number, group in enumerate(groups):
            _draw_group(axes, group, number * pitch, f"tip{number}", tips)
        _tidy(axes, "x", kept_spine="left")
        return _svg(figure, name, title, tips)


def _draw_group(axes: Axes, group: BarGroup, top: float, tip: str, tips: dict[str, list[str]]) -> None:
    middle = top + _LABEL / 2 + 1
    axes.annotate(group.name, (0, middle), (3, 0), textcoords="offset points", va="center", color=_TEXT)
    values = " / ".join(f"{bar.value:.3f}" if bar else "–" for bar in group.bars)
    axes.text(1, middle, f"{group.detail}   {values}", va="center", ha="right", color=_MUTED)
    for series, bar in enumerate(group.bars):
        if bar is None:
            continue
        height = top + _LABEL + (series + 0.5) * _BAR
        tips[f"{tip}bar{series}"] = [f"{group.name}: {bar.value:.3f} [{bar.low:.3f}, {bar.high:.3f}]"]
        axes.barh(height, bar.value, _BAR - 1.5, color=_SERIES[series], gid=f"{tip}bar{series}")
        for color, width in ((_PAGE, 3), (_TEXT, 1.2)):  # the wider one sets the interval off from the bar
            axes.hlines(height, bar.low, bar.high, color=color, linewidth=width)


def _svg(figure: Canvas, name: str, title: str, tips: Mapping[str, Sequence[str]]) -> Markup:
    """Return the figure as an SVG element for an HTML page, with `tips` as tooltips.

    Args:
        figure: to draw.
        name: prefix of the element's ids.
        title: read out by screen readers.
        tips: gid of an artist -> one text for each mark that it draws.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML knows SVG's elements without a namespace
        element.text = element.text and element.text.strip()
        element.tail = None
    for unwanted in ("metadata", "defs"):  # an address, and a style sheet that would apply to the whole page
        root.remove(next(child for child in root if child.tag == unwanted))
    for group in root.iter("g"):
        for mark, text in zip(_marks(group), tips.get(group.attrib.pop("id", ""), ())):
            ElementTree.SubElement(mark, "title").text = text
    for element in root.iter():
        element.attrib = dict(_localized(element.attrib, name))
        element[:] = [child for child in element if child.tag != "g" or len(child)]
    root.attrib = {"class": "chart", "role": "img", "aria-label": title, "viewBox": root.attrib["viewBox"]}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _marks(group: ElementTree.Element) -> list[ElementTree.Element]:
    """Return what an artist draws: its markers, or its path."""
    return list(group.iter("use")) or [child for child in group if child.tag == "path"]


def _localized(attributes: Mapping[str, str], name: str) -> Iterator[tuple[str, str]]:
    """Yield attributes with ids that are unique in the page, with CSS variables for colors and the page's font."""
    for key, value in attributes.items():
        key = key.rpartition("}")[2]
        if key == "id":
            value = f"{name}-{value}"
        elif key in ("href", "clip-path"):
            value = value.replace("#", f"#{name}-")
        elif key == "style":
            value = re.sub(r"font-family: [^;]*; ?", "", value)
            for variable, (color, _) in CSS_COLORS.items():
                value = value.replace(color, f"var(--{variable})")
        if not (key == "transform" and value.startswith("rotate(-0 ")):
            yield key, value
