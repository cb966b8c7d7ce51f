"""Deltas on a base whose weights are packed and run again for their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

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
