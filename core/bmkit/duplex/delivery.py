"""What of an answer the user has had: the rest never was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bmkit.data.slices.layout import Layout
from bmkit.duplex.spelling import spell
from bmkit.duplex.units import Unit


def delivered(
    tokenizer: Any, layout: Layout, units: Sequence[Unit], answer: int, characters: int
) -> tuple[list[Unit], int]:
    """Return the slices without what lies behind an answer's first `characters`.

    A token stays if all of its characters were delivered. The second value is how many went.
    """
    mine = [unit for unit in units if unit.answer == answer]
    ids = [token for unit in mine for token in unit.agent or ()]
    _, ends = spell(tokenizer, ids)
    characters -= mine[0].before if mine else 0
    left = next((i for i, end in enumerate(ends) if end > characters), len(ids))
    if left == len(ids):
        return list(units), 0
    while left and ends[left - 1] == (ends[left - 2] if left > 1 else 0):
        left -= 1  # the beginning of a character that wasn't delivered
    gone = len(ids) - left
    found = []
    for unit in units:
        if unit.answer == answer and unit.agent is not None:
            said = unit.agent[: max(left, 0)]
            left -= len(unit.agent)
            unit = replace(unit, agent=said) if said else unit.silenced(layout)
        found.append(unit)
    return found, gone
