"""Charts as SVG within a page: lines, bands and stacked areas, whose values show under the pointer."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence

import msgspec

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 42
INNER_W, INNER_H = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

Values = Sequence[float | None]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One line. y: None where there is no value. low, high: a band around it. faint: thin and pale.

    said: what shows of it under the pointer, for each point; empty for `y` itself.
    """

    name: str
    colour: str
    y: Values
    low: Values = ()
    high: Values = ()
    faint: bool = False
    dots: bool = False
    said: Sequence[str] = ()


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """Series over the same points.

    x: ascending. labels: what each point is, for the tip. ticks: values of x that are marked; empty for round ones.
    top: end of the y axis, 0 for the largest value. note: what lies beyond it. stacked: each series on those before.
    """

    series: Sequence[Series]
    x: Sequence[float]
    labels: Sequence[str]
    x_label: str
    y_label: str
    top: float = 0.0
    note: str = ""
    ticks: Sequence[float] = ()
    stacked: bool = False
    value: Callable[[float], str] = "{:.3g}".format


def svg(chart: Chart, title: str) -> str:
    """The chart. Its points lie in `data-points`, where the page's script finds them; all texts are escaped."""
    low, high = _span(chart)
    top = chart.top or _largest(chart) or 1.0

    def place_x(value: float) -> float:
        return INNER_W * (value - low) / ((high - low) or 1.0)

    def place_y(value: float) -> float:
        # Far beyond the frame all is alike.
        return INNER_H * (1 - max(-1.0, min(value / top, 50.0)))

    xs = [place_x(value) for value in chart.x]
    points = {
        "at": [round(LEFT + x, 1) for x in xs],
        "labels": list(chart.labels),
        "lines": [
            [one.name, one.colour, list(one.said) or ["–" if y is None else chart.value(y) for y in one.y]]
            for one in chart.series
        ],
    }
    data = html.escape(msgspec.json.encode(points).decode())
    return "".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{html.escape(title)}" '
            f'data-points="{data}">',
            *_grid(chart, top, place_x, place_y),
            f'<svg x="{LEFT}" y="{TOP}" width="{INNER_W}" height="{INNER_H}">',
            *(_stack(chart, xs, place_y) if chart.stacked else _lines(chart, xs, place_y)),
            "</svg>",
            *([_text(LEFT + 0.12 * INNER_W, TOP + 14, chart.note)] if chart.note else []),
            f'<line class="rule" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{TOP + INNER_H}" visibility="hidden"/>',
            "</svg>",
        ]
    )


def legend(chart: Chart) -> str:
    """The names of the series, each beside its colour."""
    names = (
        f'<li><i style="background:{one.colour}{";opacity:.4" * one.faint}"></i>{html.escape(one.name)}</li>'
        for one in chart.series
    )
    return f'<ul class="legend">{"".join(names)}</ul>'


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(1, most - 1)
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _span(chart: Chart) -> tuple[float, float]:
    """The ends of the x axis; separate points get room on both sides."""
    first, last = chart.x[0], chart.x[-1]
    room = 0.4 if chart.ticks else 0.0
    return first - room, max(last, first + 1 - room) + room


def _largest(chart: Chart) -> float:
    if chart.stacked:
        rows = zip(*(one.y for one in chart.series), strict=True)
        return 1.08 * max((sum(value or 0.0 for value in row) for row in rows), default=1.0)
    known = [value for one in chart.series for values in (one.y, one.high) for value in values if value is not None]
    return 1.08 * max(known, default=1.0)


def _grid(
    chart: Chart, top: float, place_x: Callable[[float], float], place_y: Callable[[float], float]
) -> Iterator[str]:
    low, high = _span(chart)
    for value in round_ticks(0, top):
        y = TOP + place_y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(LEFT - 6, y + 4, _short(value), "end")
    for value in chart.ticks or round_ticks(low, high):
        yield _text(LEFT + place_x(value), TOP + INNER_H + 17, _short(value), "middle")
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{TOP + INNER_H}" y2="{TOP + INNER_H}"/>'
    yield _text(LEFT + INNER_W / 2, HEIGHT - 6, chart.x_label, "middle")
    middle = TOP + INNER_H / 2
    yield (
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{html.escape(chart.y_label)}</text>"
    )


def _lines(chart: Chart, xs: Sequence[float], place_y: Callable[[float], float]) -> Iterator[str]:
    for one in chart.series:
        if one.low:
            yield _area(xs, one.low, one.high, one.colour, 0.16, place_y)
        width, opacity = (0.9, 0.4) if one.faint else (2.0, 1.0)
        for piece in _pieces(xs, one.y):
            path = " ".join(f"{x:.1f},{place_y(y):.1f}" for x, y in piece)
            yield (
                f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="{width}" '
                f'stroke-opacity="{opacity}" stroke-linejoin="round"/>'
            )
            if one.dots or len(piece) == 1:
                yield from (f'<circle cx="{x:.1f}" cy="{place_y(y):.1f}" r="3" fill="{one.colour}"/>' for x, y in piece)


def _stack(chart: Chart, xs: Sequence[float], place_y: Callable[[float], float]) -> Iterator[str]:
    if len(xs) == 1:
        xs = [0.0, float(INNER_W)]
    below = [0.0] * len(xs)
    for one in chart.series:
        values = list(one.y) * (len(xs) // len(one.y))
        above = [base + (value or 0.0) for base, value in zip(below, values, strict=True)]
        yield _area(xs, below, above, one.colour, 0.85, place_y)
        below = above


def _area(
    xs: Sequence[float], low: Values, high: Values, colour: str, opacity: float, place_y: Callable[[float], float]
) -> str:
    known = [(x, a, b) for x, a, b in zip(xs, low, high, strict=True) if a is not None and b is not None]
    edge = [(x, b) for x, _, b in known] + [(x, a) for x, a, _ in reversed(known)]
    path = " ".join(f"{x:.1f},{place_y(y):.1f}" for x, y in edge)
    return f'<polygon points="{path}" fill="{colour}" fill-opacity="{opacity}"/>'


def _pieces(xs: Sequence[float], values: Values) -> Iterator[list[tuple[float, float]]]:
    """Runs of points that have a value."""
    piece: list[tuple[float, float]] = []
    for x, value in zip(xs, values, strict=True):
        if value is None:
            if piece:
                yield piece
            piece = []
        else:
            piece.append((x, value))
    if piece:
        yield piece


def _short(value: float) -> str:
    """A tick: 0.25, 2,000, 40k, 3M."""
    for power, letter in ((1e6, "M"), (1e4, "k")):
        if value >= power:
            return f"{value / (1e3 if letter == 'k' else power):,.6g}{letter}"
    return f"{value:,.6g}"


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
