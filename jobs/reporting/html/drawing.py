"""Figures as SVG that takes the colours of the page around it: text and axes follow dark mode, data keeps its own."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

_INK = "#7f7f80"  # stands for the page's text colour, which replaces it
# Colours that are told apart on light and dark ground, also by most who see red and green alike (after Okabe and Ito).
COLORS = ("#0f83c9", "#d9730d", "#1a9e77", "#c0569a", "#8a7a00", "#5b6fd6", "#b5483c", "#5f9130")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: its points, and its label in the legend. ``spread`` are the lower and upper ends about the points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One job in a plane: where, which name, which colour by its number, and whether no other is better in both ways."""

    number: int
    label: str
    x: float
    y: float
    is_best: bool = False
    spread: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What a figure's axes say. ``is_log`` draws y by powers of ten, ``whole`` puts ticks of x at whole numbers."""

    x: str
    y: str
    is_log: bool = False
    whole: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)  # horizontal lines by label


def lines(title: str, series: Sequence[Series], axis: Axis) -> Markup:
    """Lines with a legend below."""

    def _draw(axes: Axes) -> None:
        for number, one in enumerate(series):
            color = COLORS[number % len(COLORS)]
            style = "-" if number < len(COLORS) else "--"
            axes.plot(one.x, one.y, style, color=color, label=one.label, marker="o" if len(one.x) < 60 else "", markersize=3)
            if one.spread is not None:
                axes.fill_between(one.x, *one.spread, color=color, alpha=0.2, linewidth=0)
        for label, height in axis.marks.items():
            axes.axhline(height, color=_INK, linestyle=":", label=label)
        _label(axes, axis)
        _legend(axes, len(series) + len(axis.marks))

    return _svg(title, _draw)


def bars(
    title: str, groups: Mapping[str, Mapping[str, float]], axis: Axis, spreads: Mapping[str, Mapping[str, tuple]]
) -> Markup:
    """A group of bars for each name, in it one bar for each label, with its interval where there is one.

    Args:
        title: said to those who do not see the figure.
        groups: name -> label -> value; all groups have the same labels.
        axis: of the values, upwards.
        spreads: name -> label -> lower and upper end.
    """
    labels = list(next(iter(groups.values())))

    def _draw(axes: Axes) -> None:
        width = 0.8 / len(labels)
        for number, label in enumerate(labels):
            places = [place + (number - (len(labels) - 1) / 2) * width for place in range(len(groups))]
            heights = [group[label] for group in groups.values()]
            axes.bar(places, heights, width * 0.92, color=COLORS[number], label=label)
            for name, place, height in zip(groups, places, heights, strict=True):
                low, high = spreads.get(name, {}).get(label, (height, height))
                if low < high:
                    span = [[max(height - low, 0)], [max(high - height, 0)]]
                    axes.errorbar([place], [height], yerr=span, ecolor=_INK, fmt="none", capsize=3)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(axis.y)
        axes.set_xlabel(axis.x)
        _legend(axes, len(labels))

    return _svg(title, _draw)


def shares(title: str, parts: Mapping[str, float], label: str) -> Markup:
    """One bar from left to right that is made of parts."""

    def _draw(axes: Axes) -> None:
        left = 0.0
        for number, (name, value) in enumerate(parts.items()):
            axes.barh([0], [value], left=left, color=COLORS[number % len(COLORS)], label=f"{name} {value:.3g}")
            left += value
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        _legend(axes, len(parts))

    return _svg(title, _draw, height=1.5)


def plane(title: str, points: Sequence[Point], axis: Axis) -> Markup:
    """Points with their names; a line joins those that no other beats in both coordinates."""

    def _draw(axes: Axes) -> None:
        for point in points:
            color = COLORS[point.number % len(COLORS)]
            axes.plot([point.x], [point.y], "o" if point.is_best else "x", color=color, markersize=7)
            if point.spread is not None:
                axes.plot([point.x] * 2, point.spread, color=color, linewidth=1)
            axes.annotate(point.label, (point.x, point.y), textcoords="offset points", xytext=(6, 5), fontsize=9)
        front = sorted((point.x, point.y) for point in points if point.is_best)
        axes.plot([x for x, _ in front], [y for _, y in front], color=_INK, linewidth=1, zorder=0)
        axes.margins(x=0.3, y=0.15)
        _label(axes, axis)

    return _svg(title, _draw)


def _label(axes: Axes, axis: Axis) -> None:
    axes.set_xlabel(axis.x)
    axes.set_ylabel(axis.y)
    if axis.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    if axis.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Axes, entries: int) -> None:
    if entries < 2:
        return
    below = 0.62 if axes.get_xlabel() else 0.28  # inches
    below += 0.18 * max((label.get_text().count("\n") for label in axes.get_xticklabels()), default=0)
    height = axes.get_position().height * axes.get_figure().get_figheight()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -below / height), ncols=min(3, entries))


def _svg(title: str, draw: Callable[[Axes], None], height: float = 2.9) -> Markup:
    # The salt names clip paths: figures of one page must not share these names.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(6.2, height))
        canvas = FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
        del canvas
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    head = re.match(r"<svg[^>]*>", drawn)
    assert head is not None
    box = re.search(r'viewBox="[^"]*"', head.group())
    assert box is not None
    opened = f'<svg {box.group()} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img">'
    return Markup(opened) + Markup("<title>{}</title>").format(title) + Markup(drawn[head.end() :])


def finite(values: Sequence[float | None]) -> list[float]:
    """The values, with a gap where there is none."""
    return [math.nan if value is None else value for value in values]
