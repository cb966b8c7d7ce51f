"""What is told of a checkpoint: against counting by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from bmkit import tables
from bmkit.compress import account, pack
from bmkit.nn.rounding import Grid, round_matrix
from bmkit.runtime import experts
from bmkit.runtime.experts import Experts, Router

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
BLOCK = 32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 64


def saved(config: Any, path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def test_bytes_weights_and_zeros_are_counted(tmp_path: Path) -> None:
    path = saved(LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path)
    weights = 2 * BLOCK + 50 * 32 + 5 * 32
    found = account.size(path)
    assert found[:2] == (2 * weights, weights)
    file = path / "model.safetensors"
    tensors = load_file(file)
    zeros = sum(int((t == 0).sum()) for t in tensors.values())
    assert found[2] == weights - zeros
    tensors["model.layers.0.mlp.up_proj.weight"][:, :8] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    assert account.size(path)[2] == weights - sum(int((t == 0).sum()) for t in tensors.values())
    assert account.size(path)[2] <= found[2] - 64 * 8 + zeros


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights_count_as_what_they_stand_for(tmp_path: Path, symmetric: bool) -> None:
    path = saved(LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path)
    file = path / "model.safetensors"
    before = account.size(path)
    tensors = load_file(file)
    grid = Grid(4, 32, symmetric)
    name = "model.layers.1.mlp.gate_proj.weight"
    weight = tensors.pop(name)
    weight[:, :5] = 0
    rounded = round_matrix(weight, grid)
    tensors |= {name.removesuffix("weight") + k: v for k, v in pack.pack(rounded, grid).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    size, weights, nonzeros = account.size(path)
    assert weights == before[1]
    others = sum(int(t.count_nonzero()) for n, t in tensors.items() if ".weight_" not in n)
    assert nonzeros == others + int(rounded.dense().count_nonzero())
    assert size < before[0]


def test_work_for_a_token_is_that_of_linear_layers_and_the_head(tmp_path: Path) -> None:
    llama = saved(LlamaConfig(**SIZES), tmp_path / "a")
    assert account.flops_per_token(llama) == 2 * (2 * BLOCK + 50 * 32)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)
    assert account.flops_per_token(saved(gpt2, tmp_path / "b")) == 2 * (2 * 12 * 32**2 + 50 * 32)
    some = {"num_local_experts": 4, "num_experts_per_tok": 2}
    mixtral = saved(MixtralConfig(**SIZES, **some), tmp_path / "c")
    rest = BLOCK - 3 * 32 * 64 + 4 * 32  # and the router
    wanted = 2 * (2 * (rest + 2 * 3 * 32 * 64) + 50 * 32)
    assert account.flops_per_token(mixtral) == wanted


def test_experts_that_a_token_leaves_out_are_no_work(tmp_path: Path) -> None:
    path = saved(LlamaConfig(**SIZES), tmp_path)
    before = account.flops_per_token(path)
    router = Router(torch.zeros(3, 32), torch.zeros(3))
    experts.write(path, Experts(16, 1, (1, -1), (router, None)))
    left_out = 2 * 16 * 3 * 32
    assert account.flops_per_token(path) == before - 2 * (left_out - 3 * 32)


def test_the_table_has_a_line_for_each_step_and_no_empty_column() -> None:
    rows = [
        account.Account("before", 2_000_000, 10**6, 10**6, 2 * 10**6, 26.7612).row(),
        account.Account("quantize", 600_000, 10**6, 990_000, 2 * 10**6, 30.1, 99.44, 512.3).row(),
    ]
    text = tables.lines(rows)
    assert len(text) == 3
    assert len({len(line) for line in text}) == 1
    heads = ["bytes", "weights", "not zero", "FLOPs/token", "perplexity", "decode tok/s"]
    assert [h.strip() for h in text[0].split("  ") if h.strip()] == [*heads, "prefill tok/s"]
    assert text[1].split() == ["before", "2", "M", "1", "M", "1", "M", "2", "M", "26.76", "-", "-"]
    assert tables.lines([]) == []
    assert "decode" not in tables.lines(rows[:1])[0]
