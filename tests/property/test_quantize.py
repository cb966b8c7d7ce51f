"""Rounding to a grid: how large its error may be, and that others read what is packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmkit.compress import pack
from bmkit.nn.rounding import Grid, dequantize, grouped, quantize, round_matrix

BITS = st.sampled_from([2, 3, 4, 8])


@st.composite
def weights(draw: st.DrawFn, size: int = 8, largest: float = 1e6) -> Tensor:
    """Draw a matrix [out, groups * size] whose rows differ widely in scale; some are zero."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * size, generator=generator)
    exact = draw(st.floats(-largest, largest, width=32, allow_subnormal=False))
    weight[draw(st.integers(0, rows - 1)), draw(st.integers(0, groups * size - 1))] = exact
    powers = draw(st.lists(st.integers(-12, 6), min_size=rows, max_size=rows))
    weight *= torch.tensor([10.0**p for p in powers]).unsqueeze(1)
    weight[torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))] = 0
    return weight


def groups_of(weight: Tensor, size: int) -> Any:
    """Return `weight` as numpy float64 [out, groups, size]."""
    return weight.double().reshape(weight.shape[0], -1, size).numpy()


@given(weights(), BITS)
@settings(max_examples=200, deadline=None)
def test_the_error_is_half_a_step_at_most_where_the_grid_reaches(weight: Tensor, bits: int) -> None:
    values, scale = quantize(weight, bits, 8)
    exact, step = groups_of(weight, 8), scale.double().unsqueeze(-1).numpy()
    error = np.abs(groups_of(dequantize(values, scale), 8) - exact) / np.abs(step)
    reached = exact / step < 2 ** (bits - 1) - 0.5
    assert (error[reached] <= 0.5 * (1 + 1e-4)).all()
    assert (error <= 1 + 1e-4).all()  # above there is one value less than below
    assert bits < 8 or (error <= 0.5 * (1 + 1e-4)).all()


@given(weights(), BITS)
@settings(max_examples=100, deadline=None)
def test_the_largest_weight_is_exact(weight: Tensor, bits: int) -> None:
    largest = np.abs(groups_of(weight, 8)).max(-1)
    values, scale = quantize(weight, bits, 8)
    top = 127 if bits == 8 else 2 ** (bits - 1)
    wanted = np.where(largest > 0, largest / top, 1.0)
    np.testing.assert_allclose(scale.abs().double().numpy(), wanted, rtol=1e-6)
    assert bits < 8 or (scale > 0).all()
    at = weight.reshape(weight.shape[0], -1, 8).abs().argmax(-1, keepdim=True)
    exact, found = (
        t.reshape(weight.shape[0], -1, 8).gather(-1, at).double().numpy()
        for t in (weight, dequantize(values, scale))
    )
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@given(weights(), BITS, st.sampled_from([1, 5]))
@settings(max_examples=100, deadline=None)
def test_values_stay_within_their_bits_and_reach_the_end(
    weight: Tensor, bits: int, search: int
) -> None:
    values, _ = quantize(weight, bits, 8, scale_search=search)
    end = 127 if bits == 8 else 2 ** (bits - 1)
    assert values.dtype == torch.int8
    found = values.reshape(weight.shape[0], -1, 8)
    largest = weight.reshape(weight.shape[0], -1, 8).abs().amax(-1)
    reached = found.abs().amax(-1) if bits == 8 else -found.amin(-1)
    assert ((reached == end) | (largest == 0)).all()
    assert int(values.min()) >= -end
    assert int(values.max()) <= 2 ** (bits - 1) - 1


@given(weights(), BITS, st.sampled_from([1, 5]))
@settings(max_examples=100, deadline=None)
def test_what_is_zero_stays_zero(weight: Tensor, bits: int, search: int) -> None:
    weight[0] = 0
    values, scale = quantize(weight, bits, 8, scale_search=search)
    assert (dequantize(values, scale)[weight == 0] == 0).all()
    assert (scale != 0).all()
    assert scale.isfinite().all()


@given(weights(largest=1e4), BITS, st.integers(2, 30))
@settings(max_examples=150, deadline=None)
def test_searching_scales_never_makes_the_weighted_error_larger(
    weight: Tensor, bits: int, search: int
) -> None:
    def squared(tries: int) -> Any:
        values, scale = quantize(weight, bits, 8, scale_search=tries)
        difference = groups_of(dequantize(values, scale), 8) - groups_of(weight, 8)
        return (difference**2 * np.abs(groups_of(weight, 8))).sum(-1)

    plain = squared(1)
    assert (squared(search) <= plain * (1 + 1e-4) + 1e-40).all()


def test_searching_scales_makes_the_error_of_a_normal_layer_smaller() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))

    def error(search: int) -> float:
        return float((dequantize(*quantize(weight, 4, 32, scale_search=search)) - weight).norm())

    assert error(20) < 0.99 * error(1)


@given(weights(), BITS)
@settings(max_examples=50, deadline=None)
def test_a_sign_changes_the_sign_and_nothing_else(weight: Tensor, bits: int) -> None:
    values, scale = quantize(weight, bits, 8)
    turned, step = quantize(-weight, bits, 8)
    assert torch.equal(dequantize(turned, step), -dequantize(values, scale))
    assert torch.equal(step.abs(), scale.abs())


@given(weights(), BITS)
@settings(max_examples=50, deadline=None)
def test_groups_and_rows_do_not_see_each_other(weight: Tensor, bits: int) -> None:
    values, scale = quantize(weight, bits, 8)
    for row in range(weight.shape[0]):
        for group in range(weight.shape[1] // 8):
            part = slice(group * 8, group * 8 + 8)
            alone, step = quantize(weight[row : row + 1, part], bits)
            assert torch.equal(alone[0], values[row, part])
            assert torch.equal(step[0, 0], scale[row, group])


@given(st.sampled_from([1e-45, 1e-43, 1e-40, 1e-38]), BITS, st.sampled_from([1, 4]))
@example(1e-45, 8, 1)
@settings(max_examples=40, deadline=None)
def test_weights_next_to_zero_keep_a_usable_scale(size: float, bits: int, search: int) -> None:
    weight = torch.tensor([[size, 0.0, -size, size / 2]])
    values, scale = quantize(weight, bits, scale_search=search)
    assert (scale != 0).all()
    assert torch.isfinite(dequantize(values, scale)).all()
    assert (values[weight == 0] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    weight = torch.ones(2, 8, dtype=dtype)
    weight[1, 3] = bad
    for group_size in (None, 4):
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize(weight, 8, group_size)


def test_a_group_size_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="group size 8 does not divide 12"):
        quantize(torch.ones(2, 12), 8, 8)


def test_the_weight_given_is_left_as_it_is() -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    quantize(weight, 4, 8, scale_search=5)
    assert torch.equal(weight, before)


def by_compressed_tensors(packed: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Unpack a layer with compressed-tensors, as vLLM and transformers do."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    state = PackedQuantizationCompressor.decompress(dict(packed), scheme)
    found: Tensor = state["weight"]
    return found


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 8]),
    layout=st.sampled_from(
        [(None, w) for w in (1, 3, 7, 8, 9, 12, 31, 33, 64)]
        + [(size, size * n) for size in (4, 12, 32) for n in (1, 3)]
    ),
    rows=st.integers(1, 5),
    search=st.sampled_from([1, 6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    symmetric=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_compressed_tensors_unpacks_exactly_what_dequantize_gives(
    seed: int,
    bits: int,
    layout: tuple[int | None, int],
    rows: int,
    search: int,
    dtype: torch.dtype,
    symmetric: bool,
) -> None:
    group_size, width = layout
    rows += 0 if symmetric else 8  # its unpacking of zero-points fails where they fill one word
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator).to(dtype)
    grid = Grid(bits, group_size, symmetric, search, dtype)
    found = round_matrix(weight, grid)
    packed = pack.pack(found, grid)
    theirs = by_compressed_tensors(packed, pack.config(grid, []))
    assert torch.equal(theirs, found.dense().to(dtype))
    assert packed["weight_scale"].dtype == dtype
    assert packed["weight_shape"].tolist() == [rows, width]
    words = -(-width * bits // 32)
    assert packed["weight_packed"].shape == (rows, words)
    assert packed["weight_packed"].dtype == torch.int32


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([None, 8]),
    search=st.sampled_from([1, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=200, deadline=None)
def test_an_asymmetric_grid_is_no_worse_and_holds_zero(
    seed: int, bits: int, group: int | None, search: int, dtype: torch.dtype
) -> None:
    """It spans the range of a group; a symmetric one spans twice the largest weight."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(6, 1, generator=generator)
    weight = torch.randn(6, 32, generator=generator) + shift
    weight[:, 3] = 0
    weight[2] = 0
    found = round_matrix(weight, Grid(bits, group, False, search, dtype))
    dense = found.dense()
    assert (dense[weight == 0] == 0).all()
    assert torch.equal(found.scale, found.scale.to(dtype).float())
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for numbers in (found.values, found.zero):
        assert numbers is not None
        assert low <= int(numbers.min()) <= int(numbers.max()) <= high
    if search == 1:
        parts = grouped(weight, group)
        span = parts.amax(-1).clamp_min(0) - parts.amin(-1).clamp_max(0)
        step = span / (2**bits - 1) * (1.01 if dtype != torch.float32 else 1.0) + 1e-6
        over = span * (0.01 if dtype != torch.float32 else 0.0)  # a scale rounded down clips
        error = (grouped(dense, group) - parts).abs().amax(-1)
        assert (error <= step + over).all()


def test_an_asymmetric_grid_is_better_where_weights_lean_to_one_side() -> None:
    weight = torch.rand(16, 64, generator=torch.Generator().manual_seed(3)) + 0.2
    errors = [
        float((round_matrix(weight, Grid(4, 32, symmetric)).dense() - weight).norm())
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_importance_chooses_the_clipping_that_matters() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    importance = torch.ones(64)
    importance[:8] = 1000
    grid = Grid(3, 32, True, 20)
    errors = []
    for given_ in (None, importance):
        difference = round_matrix(weight, grid, given_).dense() - weight
        errors.append(float((difference.square() * importance).sum()))
    assert errors[1] < errors[0]
