"""Frozen weights shared out; by two processes in `tests/e2e/test_tune.py`, here by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit.train.activations import counted
from bmkit.train.sharing import share_out, shared

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """Let there be a group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    config = LlamaConfig(vocab_size=47, **sizes, num_attention_heads=2)  # type: ignore[arg-type]
    model = LlamaForCausalLM(config).requires_grad_(False)
    for block in model.model.layers:
        block.mlp.gate = nn.Parameter(torch.tensor(0.5), requires_grad=False)  # a scalar
    model.model.layers[1].self_attn.q_proj.requires_grad_(True)
    return model


def test_what_is_frozen_in_blocks_is_shared_and_nothing_else(model: Any) -> None:
    inside = {
        n for n, _ in model.named_parameters() if ".layers." in n and "mlp.gate" not in n[-9:]
    }
    trained = "model.layers.1.self_attn.q_proj.weight"
    size = share_out(model, torch.device("cpu"))
    assert set(shared(model)) == inside - {trained}
    assert size == sum(model.get_parameter(n).numel() * 4 for n in shared(model))


def test_the_loss_and_its_gradients_stay_as_they_are(model: Any) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    plain = model(input_ids=IDS, labels=IDS).loss
    plain.backward()
    gradient, weight.grad = weight.grad.clone(), None
    share_out(model, torch.device("cpu"))
    found = model(input_ids=IDS, labels=IDS).loss
    found.backward()
    assert torch.equal(found, plain) and torch.equal(weight.grad, gradient)
    with torch.inference_mode():
        model(input_ids=IDS)
    weight.grad = None
    model.model(input_ids=IDS).last_hidden_state.sum().backward()  # its body alone
    assert weight.grad is not None and not torch.equal(weight.grad, gradient)


def test_gathered_weights_are_not_counted_as_kept(model: Any) -> None:
    def kept() -> list[int]:
        with counted(model, tuple(model.model.layers), drop=True) as found:
            model(input_ids=IDS, labels=IDS)
        return found.blocks

    before = kept()
    share_out(model, torch.device("cpu"))
    assert kept() == before and before[1] > 0
