"""A picture of conversations: who said what in which slice, and how likely silence was."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from html import escape

from bmkit.data.slices.dialogue import UNFINISHED
from bmkit.duplex.metrics import Conversation, Moment
from bmkit.picture import COLOURS

ACROSS = 10
"""Slices side by side; more go below."""
WIDE, USER, AGENT, LIKELY, GAP = 128, 46, 74, 26, 16
"""Pixels of a slice, of the lanes of the user and the agent, of the bars, and below them."""
LEFT = 64
TEXT = "font-family='sans-serif' font-size='10'"
LINES = {"user": 3, "agent": 5}


def picture(conversations: Sequence[Conversation], slice_ms: int) -> str:
    """Return an SVG of conversations, one below the other: two lanes, a bar for p(idle).

    What the agent says too early is framed.
    """
    width = LEFT + ACROSS * WIDE + 8
    shapes: list[str] = []
    top = 8
    for one in conversations:
        shapes.append(_text(8, top + 14, one.id, size=13))
        top += 24
        for start in range(0, len(one.moments), ACROSS):
            row = one.moments[start : start + ACROSS]
            shapes += _row(row, start, top, slice_ms)
            top += USER + AGENT + LIKELY + GAP
        top += 8
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}">',
            f'<rect width="{width}" height="{top}" fill="white"/>',
            *shapes,
            "</svg>",
            "",
        ]
    )


def _row(row: Sequence[Moment], start: int, top: int, slice_ms: int) -> Iterator[str]:
    """Yield the shapes of slices side by side; `start` is the number of the first."""
    lanes = (("user", top, USER), ("agent", top + USER, AGENT))
    for name, at, tall in lanes:
        yield _text(8, at + tall / 2, name)
    yield _text(8, top + USER + AGENT + LIKELY / 2 + 4, "p(idle)")
    for number, moment in enumerate(row):
        x = LEFT + number * WIDE
        yield _box(x, top, USER, moment.user, COLOURS[0])
        yield _said(x, top, moment.user, LINES["user"])
        early = moment.tag in UNFINISHED and moment.agent is not None
        yield _box(x, top + USER, AGENT, moment.agent, COLOURS[2], early=early)
        yield _said(x, top + USER, moment.agent, LINES["agent"])
        below = top + USER + AGENT
        if moment.p_idle is not None:
            size = LIKELY * min(max(moment.p_idle, 0.0), 1.0)
            yield (
                f'<rect x="{x + 1}" y="{below + LIKELY - size:.1f}" width="{WIDE - 2}" '
                f'height="{size:.1f}" fill="{COLOURS[3]}" fill-opacity="0.35"/>'
            )
            yield _text(x + 4, below + LIKELY - 4, f"{moment.p_idle:.2f}")
        seconds = (start + number) * slice_ms / 1000
        label = f"{seconds:g} s" + (f" {moment.tag}" if moment.tag else "")
        yield _text(x + 4, below + LIKELY + 10, label, colour="#777")


def _box(x: int, y: int, tall: int, said: str | None, colour: str, *, early: bool = False) -> str:
    fill = "#f4f4f4" if said is None else colour
    frame = f' stroke="{COLOURS[1]}" stroke-width="2"' if early else ""
    return (
        f'<rect x="{x + 1}" y="{y + 1}" width="{WIDE - 2}" height="{tall - 2}" '
        f'fill="{fill}" fill-opacity="{0.25 if said is not None else 1}"{frame}/>'
    )


def _said(x: int, y: int, said: str | None, most: int) -> str:
    found = textwrap.wrap((said or "").strip(), 22)
    if len(found) > most:
        found = [*found[: most - 1], found[most - 1][:20] + " …"]
    return "".join(_text(x + 5, y + 14 + 13 * n, line) for n, line in enumerate(found))


def _text(x: float, y: float, text: str, *, size: int = 10, colour: str = "#222") -> str:
    font = TEXT.replace("'10'", f"'{size}'")
    text = "".join(sign if sign.isprintable() else "·" for sign in text)  # XML has no control signs
    return f'<text x="{x:g}" y="{y:g}" {font} fill="{colour}">{escape(text)}</text>'


def chosen(conversations: Sequence[Conversation], kinds: Sequence[str], most: int = 6) -> list[int]:
    """Return the numbers of the first conversations of each kind, up to `most`."""
    seen: dict[str, int] = {}
    for number, kind in enumerate(kinds[: len(conversations)]):
        seen.setdefault(kind, number)
    return sorted(seen.values())[:most]
