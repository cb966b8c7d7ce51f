"""LoRA in one with its layer, against PEFT's own forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bmkit.nn import products
from bmkit.train.dropout import DroppedLinear, replace_dropout
from bmkit.train.fused_lora import FusedLora, _Fused, fuse


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64, bias=bias), nn.Linear(64, 32, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.nn.functional.silu(self.first(x)))
        return found


def tuned(
    dtype: torch.dtype = torch.float32, *, bias: bool = True, p: float = 0.0, **how: Any
) -> Any:
    """Return a small model with LoRA that changes what it says."""
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=p, target_modules=["first", "second"], **how
    )
    model = get_peft_model(Net(bias).to(dtype), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return model


def layer(model: Any) -> Any:
    return model.base_model.model.first


def grown(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients of the input and of all that is trained."""
    x = x.clone().requires_grad_()
    out = model(x)
    wanted = [x, *[p for p in model.parameters() if p.requires_grad]]
    return out, list(torch.autograd.grad(out.float().square().sum(), wanted))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quick", [True, False])
def test_float32_is_pefts(bias: bool, quick: bool) -> None:
    plain, fused = tuned(bias=bias), tuned(bias=bias)
    assert fuse(fused) == 2
    x = torch.randn(3, 20, 48)
    with products.quick() if quick else torch.enable_grad():
        (a, ga), (b, gb) = grown(plain, x), grown(fused, x)
    torch.testing.assert_close(b, a)
    for one, other in zip(gb, ga, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32s_and_its_gradients_are_float32() -> None:
    plain, fused = tuned(), tuned(torch.bfloat16)
    fuse(fused)
    x = torch.randn(2, 9, 48)
    (a, ga), (b, gb) = grown(plain, x), grown(fused, x.bfloat16())
    assert b.dtype == torch.bfloat16
    assert {g.dtype for g in gb[1:]} == {torch.float32}
    for one, other in zip([b, *gb], [a, *ga], strict=True):
        assert (one.float() - other).abs().max() < 0.03 * other.abs().max()


def test_it_keeps_one_copy_of_activations() -> None:
    fused = tuned()
    fuse(fused)
    x = torch.randn(16, 48, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(fused)(x)
    assert [t for t in kept if t.shape[0] == 16 and t.data_ptr() != x.data_ptr()] == []


def test_dropout_is_that_of_the_layer_it_takes_the_place_of() -> None:
    apart, fused = tuned(p=0.4).train(), tuned(p=0.4).train()
    for model in (apart, fused):
        replace_dropout(model)
        assert type(layer(model).lora_A["default"]) is DroppedLinear
    fuse(fused)
    x = torch.randn(5, 7, 48)
    torch.manual_seed(11)
    a, ga = grown(apart, x)
    torch.manual_seed(11)
    b, gb = grown(fused, x)
    torch.testing.assert_close(b, a)
    for one, other in zip(gb, ga, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not torch.equal(b, fused(x))  # other values are dropped
    fused.eval()
    torch.testing.assert_close(fused(x), apart.eval()(x))


def test_dropout_in_bfloat16_drops_the_same() -> None:
    wide, fused = tuned(p=0.4).train(), tuned(torch.bfloat16, p=0.4).train()
    for model in (wide, fused):
        replace_dropout(model)
        fuse(model)
    x = torch.randn(6, 9, 48).bfloat16()
    torch.manual_seed(4)
    a, ga = grown(wide, x.float())
    torch.manual_seed(4)
    b, gb = grown(fused, x)
    for one, other in zip([b, *gb], [a, *ga], strict=True):
        assert (one.float() - other).abs().max() < 0.04 * other.abs().max()


def test_a_delta_that_is_frozen_keeps_nothing_and_lets_gradients_through() -> None:
    plain, fused = tuned().requires_grad_(False), tuned().requires_grad_(False)
    fuse(fused)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(16, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(fused)(x)
    assert kept and all(t.shape[0] != 16 for t in kept)
    (a, ga), (b, gb) = grown(plain, x.detach()), grown(fused, x.detach())
    torch.testing.assert_close(b, a)
    torch.testing.assert_close(gb, ga, rtol=1e-4, atol=1e-5)


def test_a_merged_delta_is_not_added_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned()
    fuse(model)
    x = torch.randn(4, 48)
    said = model(x)
    model.merge_adapter()
    assert fused_calls(model, x, monkeypatch) == 0
    torch.testing.assert_close(model(x), said, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert fused_calls(model, x, monkeypatch) == 2


def fused_calls(model: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many layers are computed in one while `model` reads `x`."""
    calls = []
    run = _Fused.apply

    def counted(*given: Any) -> Any:
        calls.append(1)
        return run(*given)

    with monkeypatch.context() as patch:
        patch.setattr(_Fused, "apply", counted)
        model(x)
    return len(calls)


def test_what_is_not_plain_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 48)
    model = tuned()
    fuse(model)
    assert fused_calls(model, x, monkeypatch) == 2
    with model.disable_adapter():
        assert fused_calls(model, x, monkeypatch) == 0
    model.add_adapter("more", LoraConfig(r=2, target_modules=["first"]))
    nn.init.normal_(layer(model).lora_B["more"].weight)
    one = model(x)
    layer(model).set_adapter(["default", "more"])
    assert fused_calls(model, x, monkeypatch) == 1  # the second layer
    assert not torch.allclose(model(x), one)
    layer(model).set_adapter("default")
    layer(model).lora_A["default"].register_forward_hook(lambda *_: None)
    assert fused_calls(model, x, monkeypatch) == 1
    assert fused_calls(model.half(), x.half(), monkeypatch) == 0


@pytest.mark.parametrize("how", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_are_as_they_were(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = tuned(**how), tuned(**how)
    fuse(model)
    x = torch.randn(4, 48)
    assert fused_calls(model, x, monkeypatch) == 0
    torch.testing.assert_close(model(x), plain(x))


def test_a_base_that_is_trained_gets_its_gradient() -> None:
    model = tuned()
    fuse(model)
    weight = layer(model).base_layer.weight.requires_grad_()
    model(torch.randn(4, 48)).sum().backward()
    assert weight.grad is not None


def test_the_layer_is_saved_and_merged_as_pefts() -> None:
    plain, model = tuned(), tuned()
    fuse(model)
    assert type(layer(model)) is FusedLora
    assert set(model.state_dict()) == set(plain.state_dict())
    x = torch.randn(4, 48)
    said = model(x)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), said, rtol=1e-4, atol=1e-5)
