"""Figures as inline SVG, each with a table of its numbers: lines, bands, maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 360, 250  # of a figure, in units of about one pixel on a phone
LEFT, RIGHT, TOP, BOTTOM = 68, 12, 10, 42
STYLES = 7  # of workers or groups; the CSS has as many colours and dashes
POINTS, ROWS = 400, 30  # the most points that a curve draws, and the most rows of it that a table shows
MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-4,-4h8v8h-8z",
    "M0,-5l5,9h-10z",
    "M0,-5l5,5l-5,5l-5,-5z",
    "M-5,-4h10l-5,9z",
    "M-5,-2h10v4h-10z",
    "M-2,-5h4v10h-4z",
)
STAR = "M0,-7l2,5h5l-4,3l2,5l-5,-3l-5,3l2,-5l-4,-3h5z"  # the anchor
# From light to dark, so that a map also reads in grey; colours of viridis.
MAP_COLOURS = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        label: its name in the legend.
        points: (x, y).
        style: number of its colour, dash and marker; None for the anchor's.
        spread: half the height of the band around each point, or empty.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: int | None
    spread: Sequence[float] = field(default=())

    @property
    def css(self) -> str:
        """The CSS class of its line, points and band in the page's style sheet."""
        return "anchor" if self.style is None else f"s{self.style % STYLES}"

    @property
    def marker(self) -> str:
        """The shape of its points, as the `d` of an SVG path around (0, 0)."""
        return STAR if self.style is None else MARKERS[self.style % STYLES]


def number(value: float | None) -> str:
    """Formats a number for readers: whole numbers below 1e7 in full, others to three or four significant digits."""
    if value is None:
        return "none"
    if isinstance(value, int) or (value == int(value) if math.isfinite(value) else False):
        return f"{int(value):,}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values inside [low, high], about `count` of them."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table that scrolls within its own box if it is too wide for the page."""
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def line_chart(name: str, title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """Curves over a common axis, with a legend, a description and their numbers.

    Args:
        name: of the figure, unique on the page.
        series: the curves; a note says how many points were left out because they are not finite.
    """
    finite, missing = [], 0
    for each in series:
        spread = each.spread or [0.0] * len(each.points)
        kept = [
            (point, s) for point, s in zip(each.points, spread, strict=True) if all(map(math.isfinite, (*point, s)))
        ]
        missing += len(each.points) - len(kept)
        if kept:
            every = math.ceil(len(kept) / POINTS)
            kept = kept[::every] + ([kept[-1]] if (len(kept) - 1) % every else [])
            spreads = [s for _, s in kept] if each.spread else ()
            finite.append(Series(each.label, [point for point, _ in kept], each.style, spreads))
    if not finite:
        why = "all its points are NaN or infinite." if missing else "the run has logged none."
        return absent(title, f"There is nothing to draw: {why}")
    xs = [x for each in finite for x, _ in each.points]
    edges = [
        y + sign * s
        for each in finite
        for (_, y), s in zip(each.points, each.spread or [0.0] * len(each.points), strict=True)
        for sign in (-1, 1)
    ]
    x_axis, y_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _Axis(min(edges), max(edges), HEIGHT - BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    parts += [_curve(each, x_axis, y_axis) for each in finite]
    said = [_said(each) for each in finite]
    if missing:
        said.append(f"Not drawn, being NaN or infinite: {missing} of the points.")
    note = f"<p>Not drawn, being NaN or infinite: {missing} of the points.</p>" if missing else ""
    legend = _legend([(each.css, each.marker, each.label) for each in finite])
    svg = _svg(name, title, f"{y_label} over {x_label}. {' '.join(said)}", "".join(parts))
    return _figure(title, svg + legend + note + _numbers(title, x_label, y_label, finite))


def map_chart(
    name: str,
    title: str,
    coordinates: Sequence[float],
    values: Sequence[Sequence[float]],
    marks: Sequence[tuple[str, float, float, int | None]],
) -> str:
    """Values on a square grid, shown as colours, with marked points.

    Args:
        values: row i, column j is the value at (coordinates[j], coordinates[i]).
        marks: label, x, y and style of each point; style None for the anchor's.
    """
    flat = [value for row in values for value in row if math.isfinite(value)]
    if not flat:
        return absent(title, "There is nothing to draw: the loss is NaN or infinite everywhere.")
    low, high = min(flat), max(flat)
    half, side = coordinates[-1], HEIGHT - TOP - BOTTOM
    cell = side / len(coordinates)
    reach = half * len(coordinates) / (len(coordinates) - 1)  # to the outer edges of the outer cells
    x_axis = _Axis(-reach, reach, LEFT, LEFT + side, exact=True)
    y_axis = _Axis(-reach, reach, TOP + side, TOP, exact=True)
    parts = ['<g shape-rendering="crispEdges">']
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = LEFT + j * cell, TOP + side - (i + 1) * cell
            fill = _map_colour((value - low) / (high - low or 1.0)) if math.isfinite(value) else "none"
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell + 0.3:.1f}" height="{cell + 0.3:.1f}" fill="{fill}"/>'
            )
    bar = LEFT + side + 26
    for step in range(50):
        y = TOP + side - (step + 1) * side / 50
        parts.append(
            f'<rect x="{bar}" y="{y:.1f}" width="16" height="{side / 50 + 0.3:.1f}" fill="{_map_colour(step / 49)}"/>'
        )
    parts.append("</g>")
    for label, y in zip(_told_apart([low, (low + high) / 2, high]), (side, side / 2 + 4, 10), strict=True):
        parts.append(f'<text x="{bar + 22}" y="{TOP + y:.1f}"{_fitted(label)}>{label}</text>')
    parts.append(_frame(x_axis, y_axis, "along the first difference", "across it", grid=False))
    for _, a, b, style in marks:
        marker = STAR if style is None else MARKERS[style % STYLES]
        place = f"translate({x_axis(a):.1f},{y_axis(b):.1f}) scale({1.1 if style is not None else 2})"
        parts.append(f'<path class="mark" d="{marker}" transform="{place}"/>')
    said = " ".join(f"{label} at ({number(a)}, {number(b)})." for label, a, b, _ in marks)
    lowest = min(
        (
            (value, coordinates[j], coordinates[i])
            for i, row in enumerate(values)
            for j, value in enumerate(row)
            if math.isfinite(value)
        )
    )
    said = (
        f"Colours from {number(low)} (light) to {number(high)} (dark). Lowest at ({number(lowest[1])}, "
        f"{number(lowest[2])}). {said}"
    )
    legend = _legend(
        [("mark", STAR if style is None else MARKERS[style % STYLES], label) for label, _, _, style in marks]
    )
    head = ["across \\ along", *map(number, coordinates)]
    rows = [[number(coordinates[i]), *map(number, values[i])] for i in reversed(range(len(values)))]
    numbers = f"<details>{_summary(title)}{table(head, rows, title)}</details>"
    return _figure(title, _svg(name, title, said, "".join(parts)) + legend + numbers)


def absent(title: str, reason: str) -> str:
    """A figure with a reason in place of what cannot be drawn."""
    return _figure(title, f'<p class="absent">{escape(reason)}</p>')


# --- parts of a figure ---


class _Axis:
    """Maps values to positions, with a small margin around them unless `exact`."""

    def __init__(self, low: float, high: float, begin: float, end: float, exact: bool = False):
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):  # all values are the same
            low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
        elif not exact:
            margin = 0.04 * (high - low)
            low, high = low - margin, high + margin
        self.low, self.high, self._begin, self._end = low, high, begin, end

    def __call__(self, value: float) -> float:
        return self._begin + (value - self.low) / (self.high - self.low) * (self._end - self._begin)

    def ticks(self, count: int) -> list[float]:
        return ticks(self.low, self.high, count)


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"


def _svg(name: str, title: str, description: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 12}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>{content}</svg>'
    )


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, grid: bool = True) -> str:
    left, right = x_axis(x_axis.low), x_axis(x_axis.high)
    bottom, top = y_axis(y_axis.low), y_axis(y_axis.high)
    parts = []
    for value in y_axis.ticks(5):
        y = y_axis(value)
        if grid:
            parts.append(f'<path class="grid" d="M{left:.1f},{y:.1f}H{right:.1f}"/>')
        label = _tick(value)
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end"{_fitted(label)}>{label}</text>')
    for value in x_axis.ticks(4):
        x = x_axis(value)
        parts.append(f'<path class="axis" d="M{x:.1f},{bottom:.1f}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{_tick(value)}</text>')
    parts.append(f'<path class="axis" d="M{left:.1f},{top:.1f}V{bottom:.1f}H{right:.1f}"/>')
    middle, centre = (left + right) / 2, (top + bottom) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 36:.1f}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(13,{centre:.1f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _tick(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    return next(text for digits in range(3, 18) if float(text := f"{value:.{digits}g}") == value)


def _told_apart(values: Sequence[float]) -> list[str]:
    """The values with as many digits, at least four, as distinguish them."""
    every = ([f"{value:.{digits}g}" for value in values] for digits in range(4, 18))
    return next(texts for texts in every if len(set(texts)) == len(set(values)))


def _fitted(label: str) -> str:
    """Attributes that make a long label as narrow as the room beside an axis."""
    return ' textLength="42" lengthAdjust="spacingAndGlyphs"' if len(label) > 6 else ""


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    places = [(x_axis(x), y_axis(y)) for x, y in series.points]
    parts = []
    if series.spread:
        upper = [(x_axis(x), y_axis(y + s)) for (x, y), s in zip(series.points, series.spread, strict=True)]
        lower = [(x_axis(x), y_axis(y - s)) for (x, y), s in zip(series.points, series.spread, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
        parts.append(f'<polygon class="band {series.css}" points="{path}"/>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline class="line {series.css}" points="{line}"/>')
    every = max(1, math.ceil(len(places) / 8))
    for x, y in places[::every]:
        parts.append(f'<path class="point {series.css}" d="{series.marker}" transform="translate({x:.1f},{y:.1f})"/>')
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, str, str]]) -> str:
    items = [
        f'<li><svg viewBox="0 -8 34 16" class="key" aria-hidden="true"><path class="line {css}" d="M0,0H34"/>'
        f'<path class="point {css}" d="{marker}" transform="translate(17,0)"/></svg>{escape(label)}</li>'
        for css, marker, label in entries
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _said(series: Series) -> str:
    (x_0, y_0), (x_1, y_1) = series.points[0], series.points[-1]
    low = min(series.points, key=lambda point: point[1])
    high = max(series.points, key=lambda point: point[1])
    return (
        f"{series.label}: {number(y_0)} at {number(x_0)}, {number(y_1)} at {number(x_1)}; lowest {number(low[1])} at "
        f"{number(low[0])}, highest {number(high[1])} at {number(high[0])}."
    )


def _numbers(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    rows = []
    for each in series:
        every = math.ceil(len(each.points) / ROWS)
        spreads: Sequence[float | None] = each.spread or [None] * len(each.points)
        for (x, y), spread in list(zip(each.points, spreads, strict=True))[::every]:
            value = number(y) if spread is None else f"{number(y)}\u00a0±\u00a0{number(spread)}"
            rows.append([each.label, number(x), value])
    thinned = any(len(each.points) > ROWS for each in series)
    note = f"<p>At most {ROWS} rows of each curve, evenly spread.</p>" if thinned else ""
    content = table(["curve", x_label, y_label], rows, title)
    return f"<details>{_summary(title)}{note}{content}</details>"


def _summary(title: str) -> str:
    return f'<summary>Numbers<span class="spoken"> of: {escape(title)}</span></summary>'


def _map_colour(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(MAP_COLOURS) - 1)
    index = min(int(place), len(MAP_COLOURS) - 2)
    low, high = list(pairwise(MAP_COLOURS))[index]
    return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in zip(low, high, strict=True))
