"""Deltas on a base of packed weights that runs again for its gradients, and on experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bmkit.deltas import compose
from bmkit.deltas.own import AdapterConfig, BitFitConfig, ParallelAdapterConfig
from bmkit.runtime.placed import load
from bmkit.runtime.placed.model import place_model

IDS = torch.tensor([[5, 9, 3, 7, 2, 11], [4, 4, 8, 1, 30, 12]])


def learned(model: Any) -> tuple[float, dict[str, Tensor]]:
    """Return the loss, and the gradients of deltas of four kinds with the same values."""
    modules = {"target_modules": ["down_proj"], "input_modules": ["gate_proj"]}
    configs = {
        "lora": LoraConfig(r=4, target_modules="all-linear"),
        "adapter": AdapterConfig(target_modules=["mlp", "model.layers.1"], bottleneck_dim=4),
        "parallel": ParallelAdapterConfig(**modules, bottleneck_dim=4),
        "bitfit": BitFitConfig(target_modules=["q_proj", "input_layernorm"]),
    }
    model = compose.attach(model, configs).train()
    draws = torch.Generator().manual_seed(3)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = torch.randn(parameter.shape, generator=draws) * 0.1
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trained.items()}


def test_gradients_are_those_on_the_dense_base(tiny_checkpoint: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    wanted, gradients = learned(dense)
    placed = place_model(
        tiny_checkpoint,
        load.empty(tiny_checkpoint),
        device=torch.device("cpu"),
        dtype=torch.float32,
        checkpoint=True,
    )
    found, others = learned(placed.model)
    placed.close()
    assert abs(found - wanted) < 1e-4 * wanted
    assert set(others) == set(gradients)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def test_weights_of_experts_are_changed_beside_an_adapter(tmp_path: Path) -> None:
    def make(seed: int = 1) -> Any:
        torch.manual_seed(0)
        model = Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                vocab_size=40,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=24,
                initializer_range=0.3,
            )
        ).eval()
        torch.manual_seed(seed)
        return model

    experts = ["experts.gate_up_proj", "experts.down_proj"]  # PEFT's layers are around each other
    every = {
        "experts": LoraConfig(r=2, target_modules=[], target_parameters=experts),
        "adapter": AdapterConfig(target_modules=["mlp", "mlp.experts"], bottleneck_dim=4),
    }
    model = compose.attach(make(), every)
    for name in every:
        for parameter in compose.parameters(model, name).values():
            parameter.data += torch.randn_like(parameter) * 0.1
    for name in every:
        compose.save(model, name, tmp_path / name)
        with compose.active(model, [name]):
            alone = logits(model)
        assert torch.equal(logits(PeftModel.from_pretrained(make(2), tmp_path / name)), alone)
    again = compose.load(make(2), {name: tmp_path / name for name in every})
    assert torch.equal(logits(again), logits(model))
    with compose.active(again, None):
        assert torch.equal(logits(again), logits(make()))
