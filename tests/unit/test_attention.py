"""Attention with gradients in float32, against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bmkit.nn import attention as ours
from bmkit.nn import products


def three(tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Return queries, keys and values [2, 4, tokens, 16], laid out as a model's are."""
    torch.manual_seed(tokens)
    return [
        torch.randn(2, tokens, 4, 16).to(dtype).transpose(1, 2).detach().requires_grad_()
        for _ in range(3)
    ]


def grads(given: list[Tensor], run: Any, **how: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    found = run(*given, **how)
    return found, torch.autograd.grad(found.float().square().sum(), given)


def padded(tokens: int) -> Tensor:
    """Return a causal mask [2, 1, tokens, tokens] whose first row is shorter."""
    mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
    mask[0, :, :, tokens - 7 :] = False
    return mask


@pytest.mark.parametrize("tokens", [17, 100])
@pytest.mark.parametrize(
    "how", [{}, {"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float", "scale": 0.3}]
)
def test_the_same_bits_and_nearer_gradients(tokens: int, how: dict[str, Any]) -> None:
    mask = padded(tokens)
    how = dict(how)
    exact = dict(how)
    if how.get("attn_mask") == "bool":
        how["attn_mask"] = exact["attn_mask"] = mask
    elif how.get("attn_mask") == "float":
        how["attn_mask"] = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")).bfloat16()
        exact["attn_mask"] = how["attn_mask"].double()
    given = three(tokens)
    torchs, grads_torch = grads(given, functional.scaled_dot_product_attention, **how)
    found, grads_found = grads(given, ours.attention, **how)
    assert found.grad_fn is not None and "_Attention" in type(found.grad_fn).__name__
    assert torch.equal(found, torchs)
    wide = [x.detach().double().requires_grad_() for x in given]
    _, right = grads(wide, functional.scaled_dot_product_attention, **exact)
    for mine, theirs, truth in zip(grads_found, grads_torch, right, strict=True):
        off = (mine.double() - truth).abs()
        assert off.max() < 0.03 * truth.abs().max()
        assert off.mean() <= 1.02 * (theirs.double() - truth).abs().mean()


@pytest.mark.parametrize(
    ("given", "how"),
    [
        (three(20, torch.float32), {}),
        (three(ours.LONGEST + 1), {}),
        (three(20), {"dropout_p": 0.1}),
        ([x.detach() for x in three(20)], {}),
    ],
    ids=["float32", "long", "dropout", "no gradient"],
)
def test_the_rest_is_torchs(given: list[Tensor], how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    found = ours.attention(*given, **how)
    torch.manual_seed(0)
    wanted = functional.scaled_dot_product_attention(*given, **how)
    assert torch.equal(found, wanted)
    assert "_Attention" not in type(found.grad_fn).__name__


def test_heads_that_are_shared() -> None:
    query, key, value = three(12)
    fewer = [x[:, :2] for x in (key, value)]
    found = ours.attention(query, *fewer, enable_gqa=True)
    assert torch.equal(
        found, functional.scaled_dot_product_attention(query, *fewer, enable_gqa=True)
    )


@pytest.mark.skipif(not products.can(), reason="needs oneDNN and AVX-512")
def test_a_models_own_attention_goes_by_it() -> None:
    with products.quick():
        found = functional.scaled_dot_product_attention(*three(20), is_causal=True)
    assert "_Attention" in type(found.grad_fn).__name__
