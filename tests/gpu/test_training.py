"""Lean training on CUDA, against autograd's own arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bmkit.train import dropout
from bmkit.train.linear_cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.0, 30.0)])
def test_the_chunked_loss_has_autograds_gradients(scale: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 1000, (300,), device="cuda")
    ours = linear_cross_entropy(hidden, weight, targets, scale=scale, softcap=softcap)
    logits = scale * hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)
    grads = [torch.autograd.grad(loss, [hidden, weight]) for loss in (ours, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_dropout_drops_the_same_values_on_the_way_back() -> None:
    layer = dropout.ReplayedDropout(0.3)
    values = torch.ones(10_000, device="cuda", requires_grad=True)
    found = layer(values)
    found.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, found.detach())
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.03)
