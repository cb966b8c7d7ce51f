"""Turn the hand-written dialogues into the rows that `bmkit duplex eval` reads; --check compares.

The notation is explained at the top of `scripts/data/duplex-eval.txt`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bmkit.data.slices.dialogue import Dialogue, Slice, Tag

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "scripts/data/duplex-eval.txt"
ROWS = ROOT / "configs/data/duplex-eval.jsonl"
AGENT_WORDS = 7
"""What the agent says in a slice, in words: about ten tokens."""
TURNS: dict[str, tuple[Tag, Tag]] = {
    "u": ("mid", "end"),
    "i": ("barge", "end"),
    "?": ("barge", "side"),
    "s": ("stop", "stop"),
    "n": ("noise", "noise"),
    "k": ("quiet", "quiet"),
}
"""Lines of the user: the tag of its slices, and that of the last one."""
ANSWERED = ("u", "i", "?")
PART = re.compile(r"\{[^}]*\}|~+|[^{~]+")


def cut(text: str, draw: random.Random) -> list[str]:
    """Cut words into slices of two to four, or at each `/`; a single word stays alone."""
    if "/" in text:
        return [part.strip() for part in text.split("/")]
    words, found = text.split(), []
    while words:
        fits = [n for n in (2, 3, 4) if n <= len(words) and len(words) - n != 1]
        size = draw.choice(fits or [len(words)])
        found.append(" ".join(words[:size]))
        del words[:size]
    return found


def user_side(mark: str, text: str, draw: random.Random) -> list[tuple[str | None, Tag]]:
    """Return what the user says in each slice of a line, with its tag."""
    within, last = TURNS[mark]
    found: list[tuple[str | None, Tag]] = []
    for part in PART.findall(text):
        if part.startswith("~"):
            found += [(None, "pause")] * len(part)
        elif part.startswith("{"):
            found += [(words, "noise") for words in cut(part.strip("{}"), draw)]
        elif part.strip():
            found += [(words, within) for words in cut(part, draw)]
    said, tag = found[-1]
    assert tag == within, f"`{text}` ends in silence"
    return [*found[:-1], (said, last)]


def agent_side(text: str) -> list[tuple[str, str | None]]:
    """Return what the agent says in each slice, and what the user says meanwhile."""
    words: list[str] = []
    heard: dict[int, str] = {}
    for part in re.findall(r"\[[^]]*\]|[^[\s]+", text):
        if part.startswith("["):
            place = max(len(words) // AGENT_WORDS, 1, *(n + 1 for n in heard))
            heard[place] = part.strip("[]")
        else:
            words.append(part)
    parts = [words[i : i + AGENT_WORDS] for i in range(0, len(words), AGENT_WORDS)]
    assert not heard or max(heard) < len(parts), f"the user speaks after `{text}`"
    return [
        (" " * (number > 0) + " ".join(part), heard.get(number))
        for number, part in enumerate(parts)
    ]


def dialogue(name: str, kind: str, lines: Sequence[tuple[str, str]]) -> Dialogue:
    """Return one dialogue. Who speaks first in the same slice is the user."""
    draw = random.Random(name)
    found: list[Slice] = []
    for number, (mark, text) in enumerate(lines):
        following = lines[number + 1][0] if number + 1 < len(lines) else ""
        if mark in TURNS:
            sides = user_side(mark, text, draw)
            found += [Slice(said, None, tag) for said, tag in sides]
            assert (mark in ANSWERED) == (following == "a"), f"{name}: `{text}`"
            if mark in ("s", "k") and following != "q":
                found += [Slice(None, None, "quiet")] * 2
        elif mark == "a":
            (first, _), *rest = agent_side(text)
            found[-1] = Slice(found[-1].user, first, found[-1].tag)
            for said, heard in rest:
                found.append(Slice(heard, said, "backchannel" if heard else "cont"))
            if following not in ("i", "?", "s", "q"):
                silent = draw.choice((1, 2, 3)) if following else 2
                found += [Slice(None, None, "quiet")] * silent
        elif mark == "q":
            found += [Slice(None, None, "quiet")] * int(text)
        else:
            raise SystemExit(f"{name}: what is `{mark}`?")
    return Dialogue(name, kind, tuple(found))


def dialogues(text: str) -> Iterator[Dialogue]:
    """Yield the dialogues of a source."""
    head, lines = "", list[tuple[str, str]]()
    for line in [*text.splitlines(), "= -"]:
        mark, _, rest = line.partition(" ")
        if mark == "=":
            if head:
                name, kind = head.split()
                yield dialogue(name, kind, lines)
            head, lines = rest, []
        elif mark and mark != "#":
            lines.append((mark, rest.strip()))


def main() -> int:
    """Write the rows, or with --check say whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    rows = [d.values() for d in dialogues(SOURCE.read_text(encoding="utf-8"))]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not parser.parse_args().check:
        ROWS.write_text(text, encoding="utf-8")
        return 0
    if ROWS.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{ROWS} is out of date: run python {Path(__file__).relative_to(ROOT)}\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
