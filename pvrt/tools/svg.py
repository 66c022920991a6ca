"""Small plots as inline SVG: colours are the page's CSS variables, all text is escaped."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

_WIDTH, _HEIGHT = 760, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 32, 44


@dataclass(frozen=True)
class Series:
    """A curve: points (x, y), and the number of its colour; 0 is the quiet one, which is dashed."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int


def colour(number: int) -> str:
    """CSS colour of a series; they come again after six."""
    return f"var(--s{0 if number == 0 else (number - 1) % 6 + 1})"


def line_plot(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Curves over a common axis; the y axis is logarithmic where values differ twentyfold. Points
    that are not finite, as a broken model has them, are left out.
    """
    series = [replace(curve, points=list(filter(_is_finite, curve.points))) for curve in series]
    points = [point for curve in series for point in curve.points]
    positive = [y for _, y in points if y > 0]
    top = max(positive, default=1.0)
    low = min(positive, default=1.0)
    log = top > 20 * low and len(positive) == len(points)
    ticks_y = _log_ticks(low, top) if log else _ticks(0.0, top)
    bottom, top = (min(low, ticks_y[0]), max(top, ticks_y[-1])) if log else (0.0, ticks_y[-1])
    xs = [x for x, _ in points] or [0.0]
    left, right = min(xs), max(xs)

    def at_x(x: float) -> float:
        return _LEFT + (x - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        share = math.log(y / bottom) / math.log(top / bottom) if log else y / (top or 1)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_frame(y_label)]
    for tick in ticks_y:
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_same("y", y)}/>')
        parts.append(_text(_LEFT - 8, y + 4, _short(tick), "end"))
    for tick in _ticks(left, right, whole=all(float(x).is_integer() for x in xs)):
        if left <= tick <= right:
            parts.append(_text(at_x(tick), _HEIGHT - _BOTTOM + 18, _short(tick), "middle"))
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_same("y", base)}/>')
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label, "middle"))
    parts += [_curve(curve, at_x, at_y) for curve in series]
    return "".join([*parts, "</svg>"])


def heat_strip(values: Sequence[tuple[str, float]], low: float, high: float) -> str:
    """A row of cells, the darker the greater between `low` and `high`; names show on hovering."""
    width = 1000 / len(values)
    cells = []
    for number, (name, value) in enumerate(values):
        share = math.log(value / low) / math.log(high / low) if high > low else 1.0
        shade = 0.12 + 0.88 * min(max(share, 0.0), 1.0)
        cells.append(
            f'<rect x="{number * width:.2f}" y="0" width="{width - min(4, width / 8):.2f}" '
            f'height="40" rx="3" fill="rgba(var(--heat), {shade:.3f})"><title>{escape(name)}: '
            f"{value:.3g} bits</title></rect>"
        )
    return (
        '<svg viewBox="0 0 1000 40" preserveAspectRatio="none" role="img">'
        + "".join(cells)
        + "</svg>"
    )


def _is_finite(point: tuple[float, float]) -> bool:
    return all(map(math.isfinite, point))


def _frame(label: str) -> str:
    """The beginning of a plot, and what its y axis shows."""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        + _text(0, 14, label, "start")
    )


def _curve(curve: Series, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> str:
    places = [(at_x(x), at_y(y)) for x, y in curve.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = " dashed" if curve.colour == 0 else ""
    drawn = (
        f'<polyline class="curve{dashed}" style="stroke: {colour(curve.colour)}" points="{path}"/>'
    )
    # Few points are marked, and each says its value on hovering.
    for (x, y), (at, value) in zip(places, curve.points, strict=True):
        radius = 3 if len(places) <= 40 and curve.colour else 0
        drawn += (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{max(radius, 6)}" fill="transparent">'
            f"<title>{escape(curve.name)}, {_short(at)}: {value:.4g}</title></circle>"
        )
        if radius:
            drawn += (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill: {colour(curve.colour)}"/>'
            )
    return drawn


def _same(axis: str, value: float) -> str:
    return f'{axis}1="{value:.1f}" {axis}2="{value:.1f}"'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(value: float) -> str:
    """A tick's label: 0.5, 2, 1e-05."""
    return f"{value:g}"


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Four to six round numbers that cover a range; fewer where they are to be whole."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5)
    step = max(round(step), 1) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around a range; where these are few, their doubles and fives, too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    below = max((tick for tick in ticks if tick <= low), default=ticks[0])
    above = min((tick for tick in ticks if tick >= high), default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above]
