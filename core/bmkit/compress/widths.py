"""How wide and deep a model is, and which smaller one has a wanted share of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

STEPS = 1000


@dataclass(frozen=True)
class Widths:
    """What a stock config can hold: the same numbers for all layers."""

    layers: int
    heads: int
    """Groups of heads that share keys and values; without grouping, heads."""
    ffn: int
    """Neurons of a feed-forward network."""
    hidden: int


def allocate(
    now: Widths,
    share: float,
    units: Collection[str],
    multiple_of: int,
    *,
    size: Callable[[Widths], int],
    holds: Callable[[Widths], bool],
) -> Widths | None:
    """Return the widths whose `size` is at most `share` of that of `now`; None if there are none.

    All `units` (names of Widths' fields) are cut alike, as far as whole numbers, `multiple_of` and
    what a config `holds` allow; the finest of them makes up for the difference.
    """
    budget = share * size(now)
    for step in range(STEPS, 0, -1):
        found = _cut(now, step / STEPS, units, multiple_of)
        if size(found) > budget:
            continue
        while "heads" in units and found.heads > 1 and not holds(found):
            found = replace(found, heads=found.heads - 1)
        if not holds(found):
            continue
        for unit in ("ffn", "hidden"):
            if unit in units:
                grain, whole = _grain(getattr(now, unit), multiple_of), getattr(now, unit)
                for width in range(getattr(found, unit) + grain, whole + 1, grain):
                    more = replace(found, **{unit: width})
                    if size(more) > budget:
                        break
                    found = more if holds(more) else found
        return found
    return None


def _cut(now: Widths, share: float, units: Collection[str], multiple_of: int) -> Widths:
    cut = {}
    for unit in units:
        whole = getattr(now, unit)
        grain = _grain(whole, multiple_of) if unit in ("ffn", "hidden") else 1
        cut[unit] = min(max(round(whole * share / grain) * grain, grain), whole)
    return replace(now, **cut)


def _grain(whole: int, multiple_of: int) -> int:
    return min(multiple_of, whole)
