"""Plots as inline SVG, coloured by the page's own variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 34
_SMALLEST = 1e-9
"""What a difference of 0 is drawn as, on a logarithmic axis."""


def parity(profile: Mapping[str, float], limit: float) -> str:
    """The largest relative difference of every module, in the order in which they run."""
    names = list(profile)
    values = [max(value, _SMALLEST) if math.isfinite(value) else 1e3 for value in profile.values()]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(*values, limit)))
    x = _scale(0, max(1, len(values) - 1), _LEFT + 6, _WIDTH - _RIGHT - 6)
    y = _scale(low, max(high, low + 1), _HEIGHT - _BOTTOM, _TOP)
    marks = "".join(
        f'<circle class="{"dot" if value <= limit else "bad"}" cx="{x(n):.1f}" cy="{y(math.log10(value)):.1f}" r="3">'
        f"<title>{escape(name)}: {profile[name]:.2g}</title></circle>"
        for n, (name, value) in enumerate(zip(names, values, strict=True))
    )
    ticks = [(float(power), f"1e{power}") for power in range(low, max(high, low + 1) + 1)]
    line = y(math.log10(limit))
    rule = f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{line:.1f}" y2="{line:.1f}"/>'
    caption = f"{len(names)} modules in the order they run; dashed: the limit {limit:g}"
    return _frame(rule + marks, _y_axis(ticks, y), caption, "module outputs against Hugging Face")


def scatter(points: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Trainer's log-probabilities over the server's, by policy."""
    every = [(float(a), float(b)) for series in points.values() for a, b in series]
    low = math.floor(min((min(pair) for pair in every), default=-1.0))
    x, y = _scale(low, 0, _LEFT, _WIDTH - _RIGHT), _scale(low, 0, _HEIGHT - _BOTTOM, _TOP)
    marks = f'<line class="limit" x1="{x(low)}" y1="{y(low)}" x2="{x(0)}" y2="{y(0)}"/>'
    for number, series in enumerate(points.values()):
        marks += "".join(f'<circle class="series{number}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2"/>' for a, b in series)
    step = max(1, -low // 5)
    ticks = [(float(value), str(value)) for value in range(0, low - 1, -step)]
    return _frame(marks, _y_axis(ticks, y) + _x_axis(ticks, x), "server, nats", "trainer's log-probabilities", points)


def curves(series: Mapping[str, Sequence[float]]) -> str:
    """Rewards by step."""
    values = [float(value) for line in series.values() for value in line]
    low, high = min(values, default=0.0), max(values, default=1.0)
    high = high if high > low else low + 1
    longest = max((len(line) for line in series.values()), default=1)
    x = _scale(0, max(1, longest - 1), _LEFT + 6, _WIDTH - _RIGHT - 6)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    marks = ""
    for number, line in enumerate(series.values()):
        path = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in enumerate(line))
        marks += f'<polyline class="line{number}" points="{path}"/>'
    ticks = [(low + (high - low) * part / 4, f"{low + (high - low) * part / 4:.2f}") for part in range(5)]
    steps = [(float(n), str(n)) for n in range(0, longest, max(1, longest // 8))]
    return _frame(marks, _y_axis(ticks, y) + _x_axis(steps, x), "step", "reward", series)


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)


def _y_axis(ticks: Sequence[tuple[float, str]], y: Callable[[float], float]) -> str:
    axis = ""
    for value, label in ticks:
        place = y(value)
        axis += f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        axis += f'<text x="{_LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{label}</text>'
    return axis


def _x_axis(ticks: Sequence[tuple[float, str]], x: Callable[[float], float]) -> str:
    places = ((x(value), label) for value, label in ticks)
    return "".join(
        f'<text x="{place:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{label}</text>'
        for place, label in places
    )


def _frame(marks: str, axes: str, below: str, title: str, series: Mapping[str, object] | None = None) -> str:
    keys = "".join(
        f'<span class="key"><i class="key{number}"></i>{escape(name)}</span>'
        for number, name in enumerate(series or ())
    )
    label = f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 2}" text-anchor="middle">{escape(below)}</text>'
    return (
        f'<figure><figcaption>{escape(title)} {keys}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{axes}{marks}{label}</svg></figure>'
    )
