"""LoRA's dropout: autograd's gradients with the same mask, and no activations for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit.train import dropout
from bmkit.train.activations import counted


def llama(layers: int = 2, width: int = 16) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def with_lora(p: float, **values: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_dropout=p, target_modules="all-linear", init_lora_weights=False, **values
    )
    return get_peft_model(llama(), config).train()


IDS = torch.arange(24).view(2, 12)


def gradients(model: Any, seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_of_p_is_dropped_and_the_mean_stays(p: float) -> None:
    values = torch.ones(200_000)
    torch.manual_seed(0)
    found = dropout.ReplayedDropout(p)(values)
    assert float((found == 0).float().mean()) == pytest.approx(p, abs=0.005)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.02)
    assert len(found.unique()) == 2


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 11)])
def test_gradients_are_autograds_with_the_same_mask(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    seed = 5
    gone = dropout.dropped(values, 0.4, seed)
    found = dropout._Dropped.apply(values, 0.4, seed)
    wanted = torch.where(gone, 0.0, values) * dropout.growth(0.4)
    torch.testing.assert_close(found, wanted)
    factor = torch.randn(shape, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad(out, values, factor)[0] for out in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_the_product_are_autograds_with_the_same_mask(bias: bool) -> None:
    layer = nn.Linear(7, 3, bias=bias).double()
    values = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(9)
    seed = dropout.draw()
    left = values.masked_fill(dropout.dropped(values, 0.4, seed), 0) * dropout.growth(0.4)
    wanted = nn.functional.linear(left, layer.weight, layer.bias)
    factor = torch.randn(2, 5, 3, dtype=torch.float64)
    given = [values, *layer.parameters()]
    theirs = torch.autograd.grad(wanted, given, factor)
    layer.__class__ = dropout.DroppedLinear
    layer.p = 0.4  # type: ignore[assignment]
    torch.manual_seed(9)
    found = layer(values)
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(torch.autograd.grad(found, given, factor), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_layers_draw_different_masks_and_a_seed_gives_the_same_ones() -> None:
    layer = dropout.ReplayedDropout(0.5)
    values = torch.ones(1000)
    torch.manual_seed(0)
    first, second = layer(values), layer(values)
    torch.manual_seed(0)
    assert torch.equal(layer(values), first)
    assert not torch.equal(first, second)


def test_nothing_is_dropped_when_measuring() -> None:
    values = torch.randn(100)
    assert torch.equal(dropout.ReplayedDropout(0.5).eval()(values), values)
    model = with_lora(0.5).eval()
    before = model(input_ids=IDS).logits
    assert dropout.replace_dropout(model) == 14
    torch.testing.assert_close(model(input_ids=IDS).logits, before)


def test_a_lora_model_keeps_its_names_and_learns_as_with_the_masks_that_are_drawn() -> None:
    model = with_lora(0.3)
    names = list(model.state_dict())
    dropout.replace_dropout(model)
    assert list(model.state_dict()) == names
    ours = gradients(model)

    class Materialised(nn.Linear):  # plain autograd, with the same draws
        p = 0.0

        def forward(self, input: Tensor) -> Tensor:
            gone = dropout.dropped(input, self.p, dropout.draw())
            left = torch.where(gone, 0.0, input) * dropout.growth(self.p)
            return super().forward(left)

    for module in model.modules():
        if isinstance(module, dropout.DroppedLinear):
            module.__class__ = Materialised
    wanted = gradients(model)
    assert ours.keys() == wanted.keys() and len(ours) == 28
    for name, grad in wanted.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def test_no_more_is_kept_than_without_dropout() -> None:
    kept = {}
    for which, p in (("none", 0.0), ("peft", 0.3), ("ours", 0.3)):
        model = with_lora(p)
        if which == "ours":
            dropout.replace_dropout(model)
        with counted(model) as found:
            model(input_ids=IDS, labels=IDS)
        kept[which] = found.total
    assert kept["ours"] == kept["none"]
    assert kept["peft"] > 1.3 * kept["none"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_when_activations_are_computed_again(reentrant: bool) -> None:
    layer = nn.Linear(8, 4)
    layer.__class__ = dropout.DroppedLinear
    layer.p = 0.5  # type: ignore[assignment]
    values = torch.randn(6, 8, requires_grad=True)
    found = []
    for again in (False, True):
        torch.manual_seed(2)
        out = checkpoint(layer, values, use_reentrant=reentrant) if again else layer(values)
        values.grad = layer.weight.grad = None
        out.square().sum().backward()
        found.append((values.grad, layer.weight.grad))
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_variants_of_lora_keep_their_dropout_in_its_place() -> None:
    model = with_lora(0.3, use_dora=True)
    assert dropout.replace_dropout(model) == 14
    kinds = {type(m).__name__ for m in model.modules()}
    assert "ReplayedDropout" in kinds and "DroppedLinear" not in kinds
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_layers_without_dropout_are_left_alone() -> None:
    model = with_lora(0.0)
    assert dropout.replace_dropout(model) == 0


def test_the_adapter_is_saved_and_loaded_as_ever(tmp_path: Path) -> None:
    from peft import PeftModel

    model = with_lora(0.3)
    dropout.replace_dropout(model)
    gradients(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert again.peft_config["default"].lora_dropout == 0.3
