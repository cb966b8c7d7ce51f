"""Which tokens go where a prompt is too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Method = Literal["tail", "head", "balanced"]


def keep(lengths: Sequence[int], excess: int, method: Method) -> list[slice]:
    """Return what stays of pieces of these `lengths`, once `excess` tokens are taken from them.

    `tail` takes from the end of the last piece, then of the one before; `head` from the beginning
    of the first, then of the next; `balanced` from all ends, in proportion to the lengths. Together
    they lose `excess` tokens exactly, or all that they have.
    """
    taken = _shares(lengths, excess) if method == "balanced" else [0] * len(lengths)
    if method != "balanced":
        order = range(len(lengths)) if method == "head" else reversed(range(len(lengths)))
        for place in order:
            taken[place] = min(lengths[place], excess)
            excess -= taken[place]
    if method == "head":
        return [slice(cut, length) for cut, length in zip(taken, lengths, strict=True)]
    return [slice(0, length - cut) for cut, length in zip(taken, lengths, strict=True)]


def _shares(lengths: Sequence[int], excess: int) -> list[int]:
    """Split `excess` in proportion to `lengths`: rounded down, then the largest rests get one."""
    total = sum(lengths)
    excess = min(excess, total)
    if not total:
        return [0] * len(lengths)
    shares = [length * excess // total for length in lengths]
    rests = [-(length * excess % total) for length in lengths]
    order = sorted(range(len(lengths)), key=rests.__getitem__)
    for place in order[: excess - sum(shares)]:
        shares[place] += 1
    return shares
