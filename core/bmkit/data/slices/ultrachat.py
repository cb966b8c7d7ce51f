"""Rows of Duplex-UltraChat, `{"output": [{"role", "content"}]}`, to dialogues and back.

arXiv 2406.15718. Sides take turns, `<idle>` is silence. What a slice is an answer to isn't in the
rows: it is told from who speaks before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmkit.data import rows
from bmkit.data.slices.dialogue import Dialogue, Slice, Tag

IDLE = "<idle>"
Pair = tuple[str | None, str | None]


def of_row(values: Mapping[str, Any], *, id: str, kind: str = "imported") -> Dialogue:
    """Return the dialogue of a row. Raises ValueError saying what is wrong with it.

    A row that ends with the user has a silent agent there.
    """
    listed = values.get("output")
    if not isinstance(listed, list) or not listed:
        raise ValueError("`output` is not a list of slices")
    sides = []
    for place, one in enumerate(listed):
        content = one.get("content") if isinstance(one, dict) else None
        if not isinstance(one, dict) or not isinstance(content, str):
            raise ValueError(f"slice {place} of `output` needs `role` and `content`, both text")
        wanted = ("user", "assistant")[place % 2]
        if one.get("role") != wanted:
            raise ValueError(f"slice {place} of `output` is not of the role {wanted}")
        said = rows.require_text(content)
        sides.append(None if said.strip() in (IDLE, "") else said)
    sides += [None] * (len(sides) % 2)
    pairs = list(zip(sides[::2], sides[1::2], strict=True))
    slices = tuple(
        Slice(user, agent, tag) for (user, agent), tag in zip(pairs, tags(pairs), strict=True)
    )
    return Dialogue(id, kind, slices)


def to_row(dialogue: Dialogue) -> dict[str, Any]:
    """Return a dialogue as such a row."""
    output = []
    for one in dialogue.slices:
        output.append({"role": "user", "content": IDLE if one.user is None else one.user})
        output.append({"role": "assistant", "content": IDLE if one.agent is None else one.agent})
    return {"output": output}


def tags(pairs: Sequence[Pair]) -> list[Tag]:
    """Return each slice's tag, as far as it can be told from who speaks when."""
    found: list[Tag] = []
    for place, (user, agent) in enumerate(pairs):
        before = pairs[place - 1][1] if place else None
        if agent is not None:
            found.append(_spoken(user, before, found))
        elif user is None:
            found.append("pause" if _unfinished(pairs, place, found) else "quiet")
        else:
            found.append(_unanswered(pairs, place, before, found))
    return found


def _spoken(user: str | None, before: str | None, found: Sequence[Tag]) -> Tag:
    if user is None:
        return "cont" if before is not None else "late"
    if before is not None or (found and found[-1] == "barge"):
        return "side"
    return "end"


def _unfinished(pairs: Sequence[Pair], place: int, found: Sequence[Tag]) -> bool:
    """Tell whether a query that isn't answered yet goes on behind a silent slice."""
    if not found or found[-1] not in ("mid", "pause", "barge"):
        return False
    later = next((pair for pair in pairs[place:] if pair != (None, None)), (None, None))
    return later[0] is not None


def _unanswered(pairs: Sequence[Pair], place: int, before: str | None, found: Sequence[Tag]) -> Tag:
    interrupts = before is not None or (bool(found) and found[-1] == "barge")
    if not interrupts:
        return "mid"
    later = pairs[place + 1] if place + 1 < len(pairs) else (None, None)
    return "stop" if later[0] is None and later[1] is None else "barge"
