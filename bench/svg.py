"""Charts as inline SVG: colours come from the page's classes (`h-<host>`), so that they follow its light or dark
scheme. Text that comes from outside is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 96, 12, 44
LABEL_GAP = 14  # between the names at the lines' ends


@dataclass(frozen=True)
class Line:
    """points: (x, y) in data units; tips: what a pointer resting on each point is told, where there are marks."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    tips: Sequence[str] = ()
    named: bool = True  # its name stands at its end


def duration(us: float) -> str:
    if us < 1000:
        return f"{us:.0f} µs"
    if us < 1_000_000:
        return f"{us / 1000:.3g} ms"
    return f"{us / 1e6:.3g} s"


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade where there are few decades, else the decades."""
    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    first = math.floor(math.log10(low))
    ticks = [m * 10.0**e for e in range(first, math.ceil(math.log10(high)) + 1) for m in steps]
    return [t for t in ticks if low <= t * 1.0001 and t <= high * 1.0001]


def linear_ticks(high: float) -> list[float]:
    if high <= 0:
        return [0.0]
    step = 10.0 ** math.floor(math.log10(high / 3))
    step *= next(m for m in (1, 2, 5, 10) if high / (step * m) <= 5.5)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]


def spread(wanted: Sequence[float], low: float, high: float, gap: float = LABEL_GAP) -> list[float]:
    """Places near the wanted ones, in the same order, at least `gap` apart and within low..high where they fit."""
    ranked = sorted(range(len(wanted)), key=lambda i: wanted[i])
    out = [0.0] * len(wanted)
    at = low - gap
    for i in ranked:
        at = max(wanted[i], at + gap)
        out[i] = at
    at = high + gap
    for i in reversed(ranked):
        at = min(out[i], at - gap)
        out[i] = at
    return out


def chart(
    lines: Sequence[Line],
    x_ticks: Sequence[tuple[float, str]],
    x_range: tuple[float, float],
    x_title: str,
    label: str,
    y_unit: str = "us",
) -> str:
    """Lines over x; y logarithmic in us, or linear from zero in another unit. Empty without points."""
    values = [y for line in lines for _, y in line.points if y > 0]
    if not values or x_range[1] <= x_range[0]:
        return ""
    logarithmic = y_unit == "us"
    if logarithmic:
        low, high = min(values) * 0.85, max(values) * 1.2
        ticks = [(t, duration(t)) for t in log_ticks(low, high)]
    else:
        low, high = 0.0, max(values) * 1.15
        ticks = [(t, f"{t:g} {y_unit}") for t in linear_ticks(high)]

    def x_at(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        share = math.log(max(y, low) / low) / math.log(high / low) if logarithmic else (y - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick, text in ticks:
        y = y_at(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text)}</text>')
    for tick, text in x_ticks:
        if x_range[0] - 1e-9 <= tick <= x_range[1] + 1e-9:
            x = x_at(tick)
            out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            out.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    ends = []
    for line in lines:
        points = [(x_at(x), y_at(y)) for x, y in line.points if y > 0 and x_range[0] <= x <= x_range[1]]
        if not points:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="3 4"' if line.dashed else ""
        out.append(f'<polyline class="line h-{escape(line.css)}" points="{path}"{dash}/>')
        for (x, y), tip in zip(points, line.tips, strict=False):
            mark = f'<circle class="mark h-{escape(line.css)}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            out.append(f"{mark}<title>{escape(tip)}</title></circle>")
        if line.named:
            ends.append((line, points[-1]))
    places = spread([y for _, (_, y) in ends], TOP + 6, HEIGHT - BOTTOM)
    for (line, (x, y)), place in zip(ends, places, strict=True):
        edge = WIDTH - RIGHT
        out.append(
            f'<path class="lead h-{escape(line.css)}" d="M{x + 5:.1f} {y:.1f}L{edge + 6} {place:.1f}"/>'
            f'<text class="name h-{escape(line.css)}" x="{edge + 9}" y="{place + 4:.1f}">{escape(line.name)}</text>'
        )
    out.append("</svg>")
    return "".join(out)


@dataclass(frozen=True)
class Bar:
    name: str
    css: str
    parts: Sequence[float]  # stacked; the first in full colour, the second lighter
    text: str
    tip: str


def bars(rows: Sequence[Bar], label: str) -> str:
    """Horizontal bars on one scale from zero, each with its text at its end."""
    high = max((sum(bar.parts) for bar in rows), default=0.0)
    if high <= 0:
        return ""
    row_height, left, room = 30, 92, WIDTH - 92 - 128
    height = row_height * len(rows) + 6
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">']
    for i, bar in enumerate(rows):
        y, x = 4 + i * row_height, float(left)
        out.append(f'<text class="name h-{escape(bar.css)}" x="{left - 8}" y="{y + 15}" text-anchor="end">')
        out.append(f"{escape(bar.name)}</text><g><title>{escape(bar.tip)}</title>")
        for k, part in enumerate(bar.parts):
            width = max(part / high * room, 0.0)
            out.append(
                f'<rect class="bar h-{escape(bar.css)}{" second" if k else ""}" x="{x:.1f}" y="{y}" '
                f'width="{width:.1f}" height="21"/>'
            )
            x += width
        out.append(f'</g><text class="value" x="{x + 8:.1f}" y="{y + 15}">{escape(bar.text)}</text>')
    out.append("</svg>")
    return "".join(out)
