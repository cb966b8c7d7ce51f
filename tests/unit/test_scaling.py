"""Scales between layers: folding them changes nothing, and rounding loses less behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from bmkit.compress.folding import fold, places
from bmkit.nn.rounding import Grid, round_matrix
from bmkit.nn.scaling import activation_aware, smooth

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "pad_token_id": 0,
}


def block_of(config: Any) -> tuple[nn.Module, Any]:
    """Return the first block of a random model, and what lets a row through it."""
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.3 if parameter.ndim == 1 else 0.0, 0.3)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    calls: list[Any] = []
    blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=torch.arange(1, 20)[None], use_cache=False)
    args, kwargs = calls[0]
    blocks[0]._forward_pre_hooks.clear()

    def run() -> Tensor:
        found = blocks[0](*args, **kwargs)
        hidden: Tensor = found[0] if isinstance(found, tuple) else found
        return hidden[0]

    return blocks[0], run


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (
            LlamaConfig(**SIZES, num_key_value_heads=2),
            {
                ("input_layernorm", 3),
                ("post_attention_layernorm", 2),
                ("mlp.up_proj", 1),
            },
        ),
        (
            LlamaConfig(**SIZES),  # as many value heads as queries
            {
                ("input_layernorm", 3),
                ("post_attention_layernorm", 2),
                ("mlp.up_proj", 1),
                ("self_attn.v_proj", 1),
            },
        ),
        (
            GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8),
            {("input_layernorm", 3), ("post_attention_layernorm", 2), ("mlp.up_proj", 1)},
        ),
        (
            Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
            {("input_layernorm", 3), ("post_attention_layernorm", 2), ("mlp.up_proj", 1)},
        ),
        (
            GPTNeoXConfig(**SIZES),  # GELU between two layers: nothing can be moved through it
            {("input_layernorm", 1), ("post_attention_layernorm", 1)},
        ),
        (
            OPTConfig(
                **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
                ffn_dim=64,
                word_embed_proj_dim=32,
            ),  # ReLU: positive factors go through
            {
                ("self_attn_layer_norm", 3),
                ("final_layer_norm", 1),
                ("self_attn.v_proj", 1),
                ("fc1", 1),
            },
        ),
    ],
    ids=["llama", "llama, all heads", "gemma", "qwen3", "gpt-neox", "opt"],
)
def test_places_are_found_and_folds_change_nothing(
    config: Any, wanted: set[tuple[str, int]]
) -> None:
    block, run = block_of(config)
    with torch.no_grad():
        before = run().clone()
    found = places(block, run)
    assert {(p.giver, len(p.takers)) for p in found} == wanted
    with torch.no_grad():
        assert torch.equal(run(), before), "looking for places leaves the block as it was"
        for place in found:
            width = block.get_submodule(place.takers[0]).in_features
            factors = torch.rand(width, generator=torch.Generator().manual_seed(1)) * 3 + 0.2
            taker = block.get_submodule(place.takers[0]).weight.clone()
            assert fold(block, place, factors, run) is not None
            assert torch.allclose(block.get_submodule(place.takers[0]).weight, taker * factors)
        assert (run() - before).abs().max() < 1e-3 * before.abs().max()
    offsets = {p.offset for p in found if isinstance(block.get_submodule(p.giver), GemmaRMSNorm)}
    assert offsets in (set(), {1.0})


def test_a_fold_that_would_change_the_output_is_taken_back() -> None:
    from bmkit.compress.folding import Place

    block, run = block_of(LlamaConfig(**SIZES))
    before = {n: p.clone() for n, p in block.named_parameters()}
    wrong = Place("input_layernorm", ("self_attn.q_proj",))  # keys and values take it too
    with torch.no_grad():
        assert fold(block, wrong, torch.full((32,), 2.0), run) is None
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())


def drawn(seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return two matrices, inputs of which a few are large, and their mean of x·xᵀ."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(48, 64, generator=generator) for _ in range(2)]
    x = torch.randn(600, 64, generator=generator)
    x[:, :4] *= 12
    return weights, x, x.T @ x / len(x)


def test_scaling_by_inputs_takes_away_a_good_part_of_the_error() -> None:
    weights, x, hessian = drawn(3)
    grid = Grid(3, 32)
    factors, left = activation_aware(weights, hessian, grid)

    def error(by: Tensor) -> float:
        return float(
            sum(
                ((round_matrix(w * by, grid).dense() / by - w) @ x.T).square().sum()
                for w in weights
            )
        )

    assert left == pytest.approx(error(factors) / error(torch.ones(64)), rel=1e-3)
    assert left < 0.8
    assert float(factors.log().mean()) == pytest.approx(0, abs=1e-5)
    assert factors[:4].min() > factors[4:].max()


def test_where_nothing_helps_nothing_is_scaled() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (16, 32), generator=generator) * 2.0 - 1  # exact on any grid
    factors, left = activation_aware([signs], torch.eye(32), Grid(4, 32))
    assert torch.equal(factors, torch.ones(32))
    assert left == 1 or left < 1e-6


def test_smoothing_makes_inputs_alike_and_leaves_dead_ones() -> None:
    weights, x, _ = drawn(5)
    x[:, 9] = 0
    largest = x.abs().amax(0)
    factors = smooth(largest, weights, 0.5)
    own = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    alive = largest > 0
    ratio = (largest / factors) / (own * factors)
    assert torch.allclose(ratio[alive], ratio[alive][0].expand(63), rtol=1e-4)
    assert torch.isfinite(factors).all()
    assert (factors > 0).all()
    flat = smooth(largest, weights, 1.0)
    assert torch.allclose((largest / flat)[alive], (largest / flat)[0].expand(63), rtol=1e-4)
