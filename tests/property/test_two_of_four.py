"""Values of which two of four are kept come back as they were, in three quarters of the bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmkit.nn import two_of_four
from bmkit.nn.rounding import Grid, round_matrix
from bmkit.nn.sparsity import magnitude


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    rows=st.integers(1, 9),
    fours=st.integers(1, 9),
    more=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_what_is_packed_comes_back(
    seed: int, bits: int, symmetric: bool, rows: int, fours: int, more: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = magnitude(torch.randn(rows, 4 * fours, generator=generator), 0.5, (2, 4))
    if more:
        weight[:, :4] = 0  # fewer than two in a group
    found = round_matrix(weight, Grid(bits, 4 if fours % 2 else None, symmetric))
    kept, places = two_of_four.pack(found.values, found.zero, bits)
    assert kept.dtype == places.dtype == torch.uint8
    assert kept.numel() == rows * fours * (2 if bits == 8 else 1)
    assert places.numel() == rows * -(-fours // 2)
    again = two_of_four.unpack(kept, places, found.zero, bits, 4 * fours)
    assert torch.equal(again, found.values)


def test_three_of_four_are_refused_and_so_is_damage() -> None:
    values = torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0]], dtype=torch.int8)
    assert not two_of_four.fits(values, None)
    assert not two_of_four.fits(torch.zeros(1, 6, dtype=torch.int8), None)
    with pytest.raises(ValueError, match="more than two of four"):
        two_of_four.pack(values, None, 4)
    values[0, 2] = 0
    kept, places = two_of_four.pack(values, None, 4)
    with pytest.raises(ValueError, match="another shape"):
        two_of_four.unpack(kept[:, :1], places, None, 4, 8)
    with pytest.raises(ValueError, match="no places"):
        two_of_four.unpack(kept, torch.zeros_like(places), None, 4, 8)
