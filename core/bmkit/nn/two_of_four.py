"""Integers of which two of four inputs matter, kept without the others: three quarters of the bits.

Of four neighbours two values are kept, and where they were: 4-bit weights take 3 bits each so.
"""

from __future__ import annotations

import torch
from torch import Tensor

OF = 4
KEPT = 2


def fits(values: Tensor, zero: Tensor | None) -> bool:
    """Tell whether at most two of each four `values` [out, inputs] (int8) differ from their zero.

    `zero` int8 [out, groups] are zero-points; None: 0.
    """
    out, inputs = values.shape
    if inputs % OF:
        return False
    some = (values != _middle(zero, out, inputs)).view(out, -1, OF)
    return bool((some.sum(-1) <= KEPT).all())


def pack(values: Tensor, zero: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Return what is kept of `values` [out, inputs] (int8), and its places, as uint8.

    Kept are two values of each four, ascending by place: bytes [out, inputs / 2] for 8 bits, else
    nibbles [out, inputs / 4] with 8 added, the first one low. Places are a nibble of four inputs,
    the first place in the lower two bits: [out, inputs / 8], rounded up. Raises ValueError if more
    than two of four differ from zero.
    """
    if not fits(values, zero):
        raise ValueError("more than two of four weights are not zero")
    out, inputs = values.shape
    fours = values.view(out, -1, OF)
    some = (values != _middle(zero, out, inputs)).view(out, -1, OF)
    order = torch.argsort((~some).to(torch.int8), dim=-1, stable=True)[..., :KEPT]
    places = order.sort(-1).values
    kept = fours.gather(-1, places).reshape(out, -1)
    if bits != 8:
        pairs = (kept + 8).view(torch.uint8).view(out, -1, KEPT)
        kept = pairs[..., 0] | (pairs[..., 1] << 4)
    nibbles = (places[..., 0] | (places[..., 1] << 2)).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    pairs = nibbles.view(out, -1, 2)
    return kept.view(torch.uint8).contiguous(), pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(kept: Tensor, places: Tensor, zero: Tensor | None, bits: int, inputs: int) -> Tensor:
    """Return the values int8 [out, inputs] that `pack` was given. Raises ValueError for damage."""
    out = len(kept)
    wide = inputs // KEPT if bits == 8 else inputs // OF
    if inputs % OF or kept.shape[1] != wide or places.shape != (out, -(-inputs // 8)):
        raise ValueError("what is kept of two of four has another shape")
    if bits == 8:
        values = kept.view(torch.int8).view(out, -1, KEPT)
    else:
        values = torch.stack((kept & 15, kept >> 4), -1).view(torch.int8) - 8
    nibbles = torch.stack((places & 15, places >> 4), -1).view(out, -1)[:, : inputs // OF]
    where = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    if bool((where[..., 0] >= where[..., 1]).any()):
        raise ValueError("the places of two of four are no places")
    found = _middle(zero, out, inputs).expand(out, inputs).clone().view(out, -1, OF)
    return found.scatter_(-1, where, values).view(out, inputs)


def _middle(zero: Tensor | None, out: int, inputs: int) -> Tensor:
    """Return what stands for zero at each input: int8 [out, inputs], or [1, 1]."""
    if zero is None:
        return torch.zeros(1, 1, dtype=torch.int8)
    return zero.repeat_interleave(inputs // zero.shape[1], 1)
