"""Bits go where they take away most, within the budget."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmkit.nn.allocation import allocate

WIDTHS = (2, 3, 4, 8)


@st.composite
def layers(draw: st.DrawFn) -> tuple[dict[str, dict[int, float]], dict[str, int], float]:
    count = draw(st.integers(1, 5))
    costs, weights = {}, {}
    for i in range(count):
        start = draw(st.floats(0.01, 10))
        falls = [draw(st.floats(0.05, 0.95)) for _ in WIDTHS[1:]]
        values = [start]
        for fall in falls:
            values.append(values[-1] * fall)
        costs[f"l{i}"] = dict(zip(WIDTHS, values, strict=True))
        weights[f"l{i}"] = draw(st.integers(1, 20)) * 64
    return costs, weights, draw(st.floats(2, 8))


@given(layers())
@settings(max_examples=200, deadline=None)
def test_the_budget_is_kept_and_little_is_left_to_gain(
    drawn: tuple[dict[str, dict[int, float]], dict[str, int], float],
) -> None:
    costs, weights, average = drawn
    found = allocate(costs, weights, average)
    room = average * sum(weights.values())
    used = sum(found[n] * weights[n] for n in found)
    assert used <= room + 1e-3
    for layer, bits in found.items():  # nobody could have more
        more = [b for b in WIDTHS if b > bits]
        if more:
            assert used + (more[0] - bits) * weights[layer] > room - 1e-3
    best = min(
        sum(costs[n][b] for n, b in zip(costs, each, strict=True))
        for each in itertools.product(WIDTHS, repeat=len(costs))
        if sum(b * weights[n] for n, b in zip(costs, each, strict=True)) <= room + 1e-6
    )
    fewest = sum(c[2] for c in costs.values())
    mine = sum(costs[n][b] for n, b in found.items())
    assert mine <= fewest + 1e-9
    assert mine >= best - 1e-9


def test_a_layer_that_loses_more_gets_more() -> None:
    costs = {
        "loud": {2: 100.0, 3: 40.0, 4: 10.0, 8: 0.1},
        "quiet": {2: 0.4, 3: 0.2, 4: 0.1, 8: 0.01},
    }
    weights = {"loud": 1000, "quiet": 1000}
    assert allocate(costs, weights, 5.0) == {"loud": 8, "quiet": 2}
    assert allocate(costs, weights, 8.0) == {"loud": 8, "quiet": 8}
    assert allocate(costs, weights, 2.0) == {"loud": 2, "quiet": 2}
    with pytest.raises(ValueError, match="fewer than the fewest"):
        allocate(costs, weights, 1.5)
