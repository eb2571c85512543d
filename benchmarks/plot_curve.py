"""python benchmarks/plot_curve.py RESULT.json... OUT.svg: greedy reward on held-out questions against the step, as a picture.

A result is JSON: {"label": "...", "seeds": {"0": [[step, greedy reward], ...], ...}}. Needs the standard library only.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 56, 44
COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed")
DASHES = ("", "6 4", "2 4", "8 3 2 3")


@dataclass(frozen=True)
class Axes:
    """Where a step and a reward lie in the picture."""

    last_step: int

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last_step

    def y(self, reward: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * reward


def svg(results: list[dict]) -> str:
    """The picture of all results: a colour for each, a dash for each of its seeds."""
    axes = Axes(max(step for result in results for points in result["seeds"].values() for step, _ in points))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_grid(axes),
    ]
    for number, result in enumerate(results):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<text x="{LEFT}" y="{16 + 15 * number}" fill="{colour}">{escape(result["label"])}</text>')
        for seed, points in enumerate(result["seeds"].values()):
            dash = DASHES[seed % len(DASHES)]
            line = " ".join(f"{axes.x(step):.1f},{axes.y(reward):.1f}" for step, reward in points)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
            )
            parts += [
                f'<circle cx="{axes.x(step):.1f}" cy="{axes.y(reward):.1f}" r="3" fill="{colour}"/>'
                for step, reward in points
            ]
    return "\n".join([*parts, "</svg>", ""])


def _grid(axes: Axes) -> list[str]:
    parts = []
    for tenths in range(0, 11, 2):
        y = axes.y(tenths / 10)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" fill="#374151" text-anchor="end">{tenths / 10:.1f}</text>')
    stride = max(1, round(axes.last_step / 8))
    for step in range(0, axes.last_step + 1, stride):
        x, y = axes.x(step), HEIGHT - BOTTOM + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" fill="#374151" text-anchor="middle">{step}</text>')
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    turned = f'<text transform="translate(14 {middle:.0f}) rotate(-90)" fill="#374151" text-anchor="middle">'
    parts.append(f"{turned}greedy reward, held out</text>")
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" fill="#374151" text-anchor="middle">training step</text>')
    return parts


def main(arguments: list[str]) -> None:
    *sources, out = map(Path, arguments)
    if not sources or out.suffix != ".svg":
        raise SystemExit(__doc__)
    out.write_text(svg([json.loads(source.read_text()) for source in sources]), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
