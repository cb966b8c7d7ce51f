"""Products by oneDNN: the same numbers as torch's own, forwards, backwards, in any model's code."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bmkit.nn import products

needed = pytest.mark.skipif(not products.can(), reason="needs registers of 512 bits")
Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_WORK", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that the shapes of all products by oneDNN go to."""
    found: list[tuple[int, ...]] = []
    own = products._onednn

    def noted(*args: Any) -> Tensor:
        found.append((*args[0].shape, len(args[1])))
        return own(*args)

    monkeypatch.setattr(products, "_onednn", noted)
    return found


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
    architecture: Build, calls: list[Any], name: str
) -> None:
    model = architecture(name, real=True)
    given = batch(name)
    with torch.inference_mode():
        wanted = model(**given).logits
        assert not calls
        with products.quick():
            found = model(**given).logits
    assert len(calls) >= 8
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def batch(name: str) -> dict[str, Tensor]:
    ids = torch.arange(2, 34)[None]
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})


@needed
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "modernbert", "mixtral"])
def test_a_models_gradients_are_the_same_and_by_onednn(
    architecture: Build, calls: list[Any], name: str
) -> None:
    model = architecture(name, real=True)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 1)  # some weights are frozen

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch(name)).logits.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    assert not calls
    with products.quick():
        found = gradients()
    assert len(calls) >= 20
    assert found.keys() == wanted.keys()
    for key, grad in found.items():
        assert torch.allclose(grad, wanted[key], rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("rows", [(20,), (2, 3, 8)])
@pytest.mark.parametrize("wide", [8, 40])
@pytest.mark.parametrize("wanting", ["x", "weight", "bias", "x weight", "x weight bias"])
def test_gradients_are_those_of_float64(rows: tuple[int, ...], wide: int, wanting: str) -> None:
    draw = torch.Generator().manual_seed(2)
    shapes = {"x": (*rows, 24), "weight": (wide, 24), "bias": (wide,)}
    given = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    plain = {name: of.double() for name, of in given.items()}
    for of in (given, plain):
        for name in wanting.split():
            of[name].requires_grad_()
    toward = torch.randn(*rows, wide, generator=draw)
    with products.quick():
        (functional.linear(given["x"], given["weight"], given["bias"]) * toward).sum().backward()
    (functional.linear(plain["x"], plain["weight"], plain["bias"]) * toward).sum().backward()
    for name in shapes:
        grad, exact_grad = given[name].grad, plain[name].grad
        assert (grad is None) == (exact_grad is None), name
        if grad is not None and exact_grad is not None:
            assert torch.allclose(grad.double(), exact_grad, rtol=1e-5, atol=1e-5), name


@needed
def test_a_frozen_weight_keeps_no_input_and_a_trained_one_keeps_one(calls: list[Any]) -> None:
    kept: list[Tensor] = []
    x = torch.randn(20, 8, requires_grad=True)
    for trained, wanted in ((False, [(4, 8)]), (True, [(20, 8), (4, 8)])):
        kept.clear()
        weight = torch.randn(4, 8, requires_grad=trained)
        with (
            products.quick(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        ):
            functional.linear(x, weight)
        assert [tuple(t.shape) for t in kept] == wanted
    assert len(calls) == 2


@needed
def test_of_what_needs_no_gradient_none_is_recorded() -> None:
    with products.quick():
        assert not functional.linear(torch.randn(20, 8), torch.randn(4, 8)).requires_grad


@needed
def test_small_products_and_automatic_casts_stay_torchs(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    x, weight = torch.randn(20, 8), torch.randn(4, 8)
    with products.quick(), torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(x, weight).dtype is torch.bfloat16
    monkeypatch.setattr(products, "LEAST_WORK", 20 * 8 * 4 + 1)
    with products.quick():
        functional.linear(x, weight)
    assert not calls
    monkeypatch.setattr(products, "LEAST_WORK", 20 * 8 * 4)
    with products.quick():
        functional.linear(x, weight)
    assert calls == [(20, 8, 4)]


def test_a_spread_out_gradient_is_taken() -> None:
    layer, x = torch.nn.Linear(8, 4), torch.randn(20, 8, requires_grad=True)
    with products.quick():
        layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(20, -1))
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(4, -1), atol=1e-5)


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


@needed
def test_a_part_of_a_matrix_takes_no_longer_than_by_torch() -> None:
    x, whole = torch.randn(256, 512), torch.randn(512, 640)
    parts = [whole[:, :512], whole[::2][:, :512], whole.t()[:512]]

    def seconds(how: Callable[[], object]) -> float:
        found = []
        for _ in range(5):
            start = time.perf_counter()
            how()
            found.append(time.perf_counter() - start)
        return min(found)

    with torch.inference_mode():
        for part in parts:
            usual = seconds(partial(functional.linear, x, part))
            assert seconds(partial(products.linear, x, part)) < 10 * usual
