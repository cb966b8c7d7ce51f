"""Products by oneDNN: the same numbers as torch's own, in any model's code, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bmkit.nn import products

needed = pytest.mark.skipif(not products.can(), reason="needs registers of 512 bits")
Build = Callable[..., Any]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = x.double() @ weight.double().T
    return found if bias is None else found + bias.double()


@pytest.mark.parametrize("rows", [(1,), (16,), (70,), (3, 9), (2, 3, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_that_of_float64(rows: tuple[int, ...], biased: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(*rows, 40, generator=draw), torch.randn(24, 40, generator=draw)
    bias = torch.randn(24, generator=draw) if biased else None
    with torch.inference_mode():
        found = products.linear(x, weight, bias)
        with products.quick():
            within = functional.linear(x, weight, bias)
            sliced = functional.linear(x[..., ::2], weight[:, ::2], bias)
            turned = functional.linear(x, weight.T.contiguous().T, bias)
    wanted = exact(x, weight, bias)
    for one in (found, within, turned):
        assert torch.allclose(one.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.allclose(
        sliced.double(), exact(x[..., ::2], weight[:, ::2], bias), rtol=1e-5, atol=1e-5
    )


@needed
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "modernbert", "mixtral"])
def test_a_model_says_the_same_and_its_layers_go_by_onednn(
    architecture: Build, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = architecture(name, real=True)
    ids = torch.arange(2, 34)[None]
    given = {"input_ids": ids}
    if name == "t5":
        given["decoder_input_ids"] = ids
    count = 0
    own = products._onednn

    def counted(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        return own(*args)

    monkeypatch.setattr(products, "_onednn", counted)
    with torch.inference_mode():
        wanted = model(**given).logits
        assert count == 0
        with products.quick():
            found = model(**given).logits
    assert count >= 8
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_are_recorded_as_ever() -> None:
    layer, x = torch.nn.Linear(8, 4), torch.randn(20, 8, requires_grad=True)
    with products.quick():
        layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(20, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(20, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    with torch.inference_mode(), products.quick():
        assert torch.equal(functional.linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_head_of_many_outputs_says_the_same_of_few_rows(rows: int) -> None:
    x, weight = torch.randn(rows, 8), torch.randn(products.MANY_OUTPUTS, 8)
    with torch.inference_mode():
        found = products.linear(x, weight)
    assert torch.allclose(found.double(), exact(x, weight, None), rtol=1e-5, atol=1e-5)


@needed
def test_a_product_that_torch_refuses_is_refused() -> None:
    with torch.inference_mode(), products.quick(), pytest.raises(RuntimeError):
        functional.linear(torch.randn(20, 8), torch.randn(4, 7))
