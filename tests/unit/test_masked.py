"""LoRA on pruned weights that will be merged: zeros stay, other deltas on the layer work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit.deltas import compose
from bmkit.deltas.masked import mask_updates
from bmkit.deltas.merge import merge
from bmkit.deltas.own import BitFitConfig

IDS = torch.arange(2, 14).reshape(2, 6)


def pruned() -> Any:
    """A random Llama of which two of four weights are zero in `q_proj`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=1, **sizes))  # type: ignore[arg-type]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:, ::2] = 0
    return model.eval()


def moved(model: Any) -> Any:
    """Give what is trained other values."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("other", ["nothing", "ia3", "bitfit"])
def test_a_merge_says_what_was_trained_and_keeps_zeros(other: str) -> None:
    beside = {
        "nothing": {},
        "ia3": {"other": IA3Config(target_modules=["q_proj"], feedforward_modules=[])},
        "bitfit": {"other": BitFitConfig(target_modules=["q_proj"])},
    }[other]
    lora = LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    model = compose.attach(pruned(), {**beside, "lora": lora})
    masks = mask_updates(model)
    assert len(masks.layers) == 1
    moved(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        if other == "bitfit":  # it has no place in weights without a bias
            return
        whole = merge(model)
        masks.apply()
        found = whole(input_ids=IDS).logits
    assert (whole.model.layers[0].self_attn.q_proj.weight[:, ::2] == 0).all()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
