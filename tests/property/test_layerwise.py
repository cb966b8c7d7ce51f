"""Methods that compress by what goes in: against closed forms, brute force, and each other."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmkit.nn import sparsity
from bmkit.nn.gptq import gptq
from bmkit.nn.hessian import STRIP, add_products, inverse_factor, mirror, output_error
from bmkit.nn.rounding import Grid, round_matrix

SEEDS = st.integers(0, 2**32 - 1)
PATTERNS = st.sampled_from([None, (2, 4), (1, 4), (4, 8)])


def draw(seed: int, rows: int = 6, inputs: int = 32, tokens: int = 96) -> tuple[Tensor, Tensor]:
    """Return a matrix [rows, inputs] and the mean of x·xᵀ of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(tokens, inputs, generator=generator) @ (mix + 0.3 * torch.eye(inputs))
    return weight, x.T @ x / tokens


@pytest.mark.parametrize("width", [1, STRIP - 1, STRIP, STRIP + 1, 2 * STRIP, 2 * STRIP + 7])
def test_half_of_the_products_are_all_of_them(width: int) -> None:
    inputs = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(width))
    total = torch.zeros(width, width)
    for rows in inputs:
        add_products(total, rows)
    mirror(total)
    flat = inputs.reshape(-1, width)
    assert torch.allclose(total, flat.T @ flat, atol=1e-4)


@given(SEEDS, st.sampled_from([1e-4, 0.01, 0.1]))
@settings(max_examples=30, deadline=None)
def test_the_factor_is_that_of_the_damped_inverse(seed: int, damp: float) -> None:
    _, hessian = draw(seed)
    factor = inverse_factor(hessian, damp).double().numpy()
    whole = hessian.double().numpy()
    wanted = np.linalg.inv(whole + damp * whole.diagonal().mean() * np.eye(len(whole)))
    assert np.allclose(np.tril(factor, -1), 0)
    assert np.allclose(factor.T @ factor, wanted, rtol=2e-2, atol=2e-3 * abs(wanted).max())


def test_what_can_not_be_inverted_is_damped_until_it_can() -> None:
    x = torch.randn(3, 16)  # three tokens
    assert torch.isfinite(inverse_factor(x.T @ x, 1e-9)).all()
    assert torch.isfinite(inverse_factor(torch.zeros(16, 16), 0.01)).all()
    with pytest.raises(ValueError, match="finite"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)


@given(
    SEEDS,
    st.booleans(),
    st.sampled_from([None, 8, 16]),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_of_independent_inputs_gptq_is_plain_rounding(
    seed: int, act_order: bool, group: int | None, bits: int, symmetric: bool
) -> None:
    weight, _ = draw(seed)
    energy = torch.rand(32, generator=torch.Generator().manual_seed(seed)) + 0.1
    grid = Grid(bits, group, symmetric, scale_search=5)
    found = gptq(weight, energy.diag(), grid, act_order=act_order)
    wanted = round_matrix(weight, grid, energy)
    assert torch.equal(found.values, wanted.values)
    assert torch.allclose(found.scale, wanted.scale)
    assert symmetric or torch.equal(found.zero, wanted.zero)


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_the_second_weight_makes_up_for_the_first(seed: int) -> None:
    """Of two weights, the second's best value is known once the first is rounded."""
    weight, hessian = draw(seed, rows=5, inputs=2, tokens=9)
    found = gptq(weight, hessian, Grid(8), act_order=False, damp=1e-6)
    values, scale = found.values, found.scale
    first = (weight[:, 0] / scale[:, 0]).round().clamp(-127, 127)
    assert torch.equal(values[:, 0].float(), first)
    rest = weight[:, 0] - first * scale[:, 0]
    best = weight[:, 1] + rest * hessian[0, 1] / hessian[1, 1]
    wanted = (best / scale[:, 0]).clamp(-127, 127)
    assert ((values[:, 1].float() - wanted).abs() < 0.5 + 1e-2).all()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 32])
def test_gptq_is_much_better_than_rounding_where_inputs_depend_on_each_other(
    act_order: bool, group: int | None
) -> None:
    weight, hessian = draw(7, rows=64, inputs=256, tokens=4096)
    found = gptq(weight, hessian, Grid(3, group), act_order=act_order)
    plain = round_matrix(weight, Grid(3, group))
    errors = [output_error(p.dense() - weight, weight, hessian) for p in (found, plain)]
    assert errors[0] < 0.75 * errors[1]


@given(SEEDS, st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_zeros_stay_and_inputs_that_never_come_change_nothing(
    seed: int, act_order: bool, symmetric: bool
) -> None:
    weight, hessian = draw(seed)
    weight = sparsity.magnitude(weight, 0.5, None)
    weight[2] = 0
    hessian[5] = hessian[:, 5] = 0
    grid = Grid(4, 16, symmetric)
    found = gptq(weight, hessian, grid, act_order=act_order, keep_zeros=True).dense()
    assert not found[weight == 0].any()
    assert not found[:, 5].any()


def test_output_error_is_that_of_outputs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 12, generator=generator)
    weight, other = (torch.randn(7, 12, generator=generator) for _ in range(2))
    wanted = (x @ (other - weight).T).norm() / (x @ weight.T).norm()
    found = output_error(other - weight, weight, x.T @ x / 50)
    assert found == pytest.approx(float(wanted), rel=1e-4)


@given(SEEDS, PATTERNS, st.sampled_from([0.1, 0.25, 0.5, 0.9]))
@settings(max_examples=60, deadline=None)
def test_each_method_leaves_exactly_what_it_is_told_to(
    seed: int, pattern: tuple[int, int] | None, share: float
) -> None:
    weight, hessian = draw(seed)
    found = {
        "magnitude": sparsity.magnitude(weight, share, pattern),
        "wanda": sparsity.wanda(weight, hessian.diagonal(), share, pattern),
        "sparsegpt": sparsity.sparsegpt(weight, hessian, share, pattern),
    }
    for name, pruned in found.items():
        kept = pruned != 0
        if pattern is None:
            assert kept.sum() == weight.numel() - round(share * weight.numel()) or name == "wanda"
        else:
            assert (kept.reshape(6, -1, pattern[1]).sum(-1) == pattern[0]).all()
        if name != "sparsegpt":
            assert torch.equal(pruned[kept], weight[kept])
    if pattern is None:
        assert ((found["wanda"] != 0).sum(1) == 32 - round(share * 32)).all()


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_magnitude_and_wanda_keep_the_largest(seed: int) -> None:
    weight, hessian = draw(seed, rows=3, inputs=8)
    for score, pruned in (
        (weight.abs(), sparsity.magnitude(weight, 0.5, (2, 4))),
        (
            weight.abs() * hessian.diagonal().sqrt(),
            sparsity.wanda(weight, hessian.diagonal(), 0.5, (2, 4)),
        ),
    ):
        for row, line in zip(score.reshape(-1, 4), pruned.reshape(-1, 4), strict=True):
            assert set(row.argsort(descending=True)[:2].tolist()) == set(
                line.nonzero()[:, 0].tolist()
            )


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_two_of_four_both_ways_is_the_best_of_all_choices(seed: int) -> None:
    weight, _ = draw(seed, rows=8, inputs=8)
    pruned = sparsity.magnitude_both_ways(weight)
    kept = (pruned != 0).float()
    assert (kept.reshape(8, 2, 4).sum(-1) == 2).all()
    assert (kept.T.reshape(8, 2, 4).sum(-1) == 2).all()
    lines = [line for line in product((0, 1), repeat=4) if sum(line) == 2]
    tile = weight[:4, :4].abs().numpy()
    best = max(
        float((tile * np.array(rows)).sum())
        for rows in product(lines, repeat=4)
        if (np.array(rows).sum(0) == 2).all()
    )
    assert float(pruned[:4, :4].abs().sum()) == pytest.approx(best, rel=1e-5)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_what_is_left_makes_up_for_a_weight_that_goes(seed: int) -> None:
    """If the first weight goes, the others are those that least squares would give."""
    weight, hessian = draw(seed, rows=1, inputs=4, tokens=40)
    weight = torch.where(weight < 0, -1.0, 1.0) * weight.abs().clamp_min(0.1)
    weight[0, 0] = 1e-3  # it costs least
    damped = hessian.double() + 1e-6 * hessian.double().diagonal().mean() * torch.eye(4)
    worst = float(torch.linalg.cond(damped))
    assume(worst < 1e4)  # (0.1 / 1e-3)²: beyond, another weight may cost less
    pruned = sparsity.sparsegpt(weight, hessian, 0.25, None, damp=1e-6)
    assert (pruned == 0).nonzero().tolist() == [[0, 0]]
    right = damped[1:] @ weight[0].double()  # H_kk w_k = H_k· w
    wanted = torch.linalg.solve(damped[1:, 1:], right)
    assert np.allclose(pruned[0, 1:].numpy(), wanted.numpy(), rtol=0, atol=1e-6 + worst * 1e-7)


def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    weight, hessian = draw(11, rows=96, inputs=256, tokens=4096)
    scales = torch.logspace(-1, 1, 256)
    hessian = hessian * scales[:, None] * scales
    errors = [
        output_error(pruned - weight, weight, hessian)
        for pruned in (
            sparsity.sparsegpt(weight, hessian, 0.5, (2, 4)),
            sparsity.wanda(weight, hessian.diagonal(), 0.5, (2, 4)),
            sparsity.magnitude(weight, 0.5, (2, 4)),
        )
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("pattern", ["2:2", "3:2", "0:4", "2:4:8", "half", ":4", "-1:4"])
def test_patterns_that_mean_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="n:m"):
        sparsity.parse_pattern(pattern)


def test_sizes_that_do_not_divide_are_refused() -> None:
    weight, hessian = draw(1, inputs=30)
    for call in (
        lambda: sparsity.magnitude(weight, 0.5, (2, 4)),
        lambda: sparsity.wanda(weight, hessian.diagonal(), 0.5, (2, 4)),
        lambda: sparsity.sparsegpt(weight, hessian, 0.5, (2, 4)),
        lambda: sparsity.magnitude_both_ways(weight),
        lambda: gptq(weight, hessian, Grid(4, 16)),
    ):
        with pytest.raises(ValueError, match="divide"):
            call()
