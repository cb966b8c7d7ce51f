"""Leaving inputs out: against brute force on the data that the statistics were made of."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmkit.compress.widths import Widths, allocate
from bmkit.nn import structured

SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, rows: int = 5, inputs: int = 12, tokens: int = 64) -> tuple[Tensor, Tensor]:
    """Return a matrix [rows, inputs], and inputs [tokens, inputs] that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    return weight, x + 0.5 * torch.randn(tokens, inputs, generator=generator)


def gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def error(weight: Tensor, x: Tensor, kept: Tensor) -> float:
    """Return the least mean squared output error that inputs `kept` can be fitted to."""
    wanted = x.double() @ weight.T.double()
    found = torch.linalg.lstsq(x[:, kept].double(), wanted).solution
    return float((x[:, kept].double() @ found - wanted).square().sum() / len(x))


@given(SEEDS, st.sampled_from([1, 2, 3]))
@settings(max_examples=30, deadline=None)
def test_a_part_has_the_energy_of_its_output(seed: int, run: int) -> None:
    weight, x = draw(seed)
    for part, found in enumerate(structured.energies(weight, gram(x), run)):
        columns = slice(part * run, (part + 1) * run)
        wanted = (x[:, columns] @ weight[:, columns].T).square().sum() / len(x)
        assert torch.allclose(found, wanted, rtol=1e-3)


@given(SEEDS, st.sampled_from([1, 2, 3]))
@settings(max_examples=30, deadline=None)
def test_the_loss_of_a_part_is_what_least_squares_leave(seed: int, run: int) -> None:
    weight, x = draw(seed)
    energy = float((x @ weight.T).square().sum() / len(x))
    for part, found in enumerate(structured.losses(weight, gram(x), run, damp=1e-7)):
        kept = torch.tensor([i for i in range(12) if i // run != part])
        wanted = error(weight, x, kept)
        assert float(found) == pytest.approx(wanted, rel=0.02, abs=1e-3 * energy)


@given(SEEDS, st.integers(1, 11))
@settings(max_examples=30, deadline=None)
def test_what_is_kept_makes_up_for_the_rest_by_least_squares(seed: int, count: int) -> None:
    weight, x = draw(seed)
    kept = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    more = structured.made_up(weight, gram(x), kept, damp=1e-7)
    gone = [i for i in range(12) if i not in kept.tolist()]
    assert not more[:, gone].any()
    found = (x[:, kept] @ (weight + more)[:, kept].T - x @ weight.T).square().sum() / len(x)
    energy = float((x @ weight.T).square().sum() / len(x))
    assert float(found) == pytest.approx(error(weight, x, kept), rel=0.02, abs=1e-3 * energy)


def test_one_part_goes_that_costs_least_of_all() -> None:
    for seed in range(20):
        weight, x = draw(seed)
        left = {p: [i for i in range(12) if i // 3 != p] for p in range(4)}
        costs = {p: error(weight, x, torch.tensor(kept)) for p, kept in left.items()}
        found = structured.best(weight, gram(x), 3, 3, refit=True, damp=1e-7)
        assert set(range(4)) - set(found.tolist()) == {min(costs, key=lambda p: costs[p])}


def test_parts_that_are_chosen_one_after_the_other_are_nearly_the_best() -> None:
    """Choosing by energy alone is worse, and all choices together are hardly better."""
    whole = {"best": 0.0, "energy": 0.0, "all": 0.0}
    for seed in range(12):
        weight, x = draw(seed, inputs=9)
        chosen = {
            "best": structured.best(weight, gram(x), 1, 5, refit=True, damp=1e-7),
            "energy": structured.best(weight, gram(x), 1, 5, refit=False, damp=1e-7),
        }
        for name, kept in chosen.items():
            assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == 5
            whole[name] += error(weight, x, kept)
        subsets = itertools.combinations(range(9), 5)
        whole["all"] += min(error(weight, x, torch.tensor(s)) for s in subsets)
    assert whole["all"] <= whole["best"] <= 1.3 * whole["all"]
    assert whole["best"] < whole["energy"]


def test_inputs_that_say_the_same_lose_nothing() -> None:
    weight, x = draw(3)
    x = torch.cat((x, x[:, :4]), 1)
    weight = torch.cat((weight, weight[:, 4:8]), 1)
    kept = structured.best(weight, gram(x), 1, 12, refit=True, damp=1e-6)
    assert error(weight, x, kept) < 1e-6


def test_statistics_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        structured.best(torch.ones(2, 4), torch.full((4, 4), torch.nan), 1, 2, refit=True, damp=0.1)


NOW = Widths(layers=6, heads=4, ffn=512, hidden=128)


def size(widths: Widths) -> int:
    """Return the parameters of a Llama's blocks with two heads a group, of 32 places."""
    attention = widths.heads * 32 * (2 + 1 + 1 + 2) * widths.hidden
    return widths.layers * (attention + 3 * widths.ffn * widths.hidden + 2 * widths.hidden)


@given(
    st.floats(0.1, 0.95),
    st.sets(st.sampled_from(["ffn", "heads", "layers", "hidden"]), min_size=1),
    st.sampled_from([1, 32, 48]),
)
@settings(max_examples=100, deadline=None)
def test_widths_have_the_share_that_is_wanted(
    share: float, units: set[str], multiple_of: int
) -> None:
    def holds(widths: Widths) -> bool:
        return widths.heads != 3 and widths.hidden % 64 == 0

    found = allocate(NOW, share, units, multiple_of, size=size, holds=holds)
    if found is None:
        never = multiple_of == 48 and "hidden" in units  # 64 and 128 are none of its multiples
        assert never or "ffn" not in units or share < 0.4
        return
    assert size(found) <= share * size(NOW)
    assert found.heads != 3 and found.hidden % 64 == 0
    for unit in ("ffn", "heads", "layers", "hidden"):
        assert 0 < getattr(found, unit) <= getattr(NOW, unit)
        if unit not in units and unit != "heads":
            assert getattr(found, unit) == getattr(NOW, unit)
    if "ffn" in units:
        assert found.ffn % multiple_of == 0 or found.ffn == NOW.ffn
        more = replace(found, ffn=found.ffn + multiple_of)
        assert more.ffn > NOW.ffn or size(more) > share * size(NOW)
