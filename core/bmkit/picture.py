"""Small pictures of numbers: as characters for a terminal, as SVG for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Return a line of at most `width` bars, from zero to the largest value.

    Where there are more values than bars, each bar is the mean of its share.
    """
    if not values:
        return ""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    top = max(means)
    if top <= 0:
        return LEVELS[0] * count
    last = len(LEVELS) - 1
    return "".join(LEVELS[max(0, min(last, round(m / top * last)))] for m in means)


def bars(values: Sequence[float], title: str, x: str, y: str) -> str:
    """Return an SVG of one bar a value; `x` and `y` name the axes."""
    width, height, left, top = 960, 320, 56, 40
    inner, tall = width - left - 16, height - top - 48
    largest = max([*values, 1])
    step = inner / max(len(values), 1)
    shapes = []
    for i, value in enumerate(values):
        size = tall * max(value, 0) / largest
        shapes.append(
            f'<rect x="{left + i * step:.2f}" y="{top + tall - size:.2f}" '
            f'width="{max(step * 0.9, 0.3):.2f}" height="{size:.2f}"/>'
        )
    mean = sum(values) / len(values) if values else 0.0
    line = top + tall - tall * mean / largest
    text = "font-family='sans-serif' font-size='13' fill='#333'"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{left}" y="24" {text}>{escape(title)}; mean {mean:.2f}</text>',
            f'<g fill="#3b6ea5">{"".join(shapes)}</g>',
            f'<path d="M{left} {top}V{top + tall}H{left + inner}" stroke="#333" fill="none"/>',
            f'<path d="M{left} {line:.2f}H{left + inner}" stroke="#b33" stroke-dasharray="4 3"/>',
            f'<text x="{left - 8}" y="{top + 5}" text-anchor="end" {text}>{largest:g}</text>',
            f'<text x="{left - 8}" y="{top + tall}" text-anchor="end" {text}>0</text>',
            f'<text x="{left + inner}" y="{height - 24}" text-anchor="end" {text}>'
            f"{escape(x)} {len(values)}</text>",
            f'<text x="{left}" y="{height - 24}" {text}>{escape(y)}</text>',
            "</svg>",
            "",
        ]
    )


COLOURS = ("#3b6ea5", "#b33939", "#3c7a3c", "#8a5ca8")


def lines(curves: Mapping[str, Sequence[tuple[float, float]]], title: str, x: str) -> str:
    """Return an SVG of curves by their names, each through its points; `x` names their first axis.

    The second axis goes from the least to the largest value of all curves.
    """
    width, height, left, top = 960, 320, 56, 40
    inner, tall = width - left - 16, height - top - 48
    points = [point for curve in curves.values() for point in curve]
    low, high = min(y for _, y in points), max(y for _, y in points)
    first, last = min(at for at, _ in points), max(at for at, _ in points)
    text = "font-family='sans-serif' font-size='13'"
    shapes = []
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [
            (
                left + inner * (at - first) / ((last - first) or 1),
                top + tall - tall * (value - low) / ((high - low) or 1),
            )
            for at, value in curve
        ]
        points_of = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        shapes.append(f'<polyline points="{points_of}" fill="none" stroke="{colour}"/>')
        a, b = places[-1]
        shapes.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>')
        right = left + 120 * (number + 1)
        shapes.append(f'<text x="{right}" y="24" {text} fill="{colour}">{escape(name)}</text>')
    grey = f"{text} fill='#333'"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{left}" y="24" {grey}>{escape(title)}</text>',
            f'<path d="M{left} {top}V{top + tall}H{left + inner}" stroke="#333" fill="none"/>',
            *shapes,
            f'<text x="{left - 8}" y="{top + 5}" text-anchor="end" {grey}>{high:.3g}</text>',
            f'<text x="{left - 8}" y="{top + tall}" text-anchor="end" {grey}>{low:.3g}</text>',
            f'<text x="{left + inner}" y="{height - 24}" text-anchor="end" {grey}>'
            f"{escape(x)} {last:g}</text>",
            "</svg>",
            "",
        ]
    )
