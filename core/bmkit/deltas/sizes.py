"""How many parameters a delta trains, from the shapes of what it goes to. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmkit.deltas.recipe import (
    AdaLora,
    Boft,
    Compacter,
    Ia3,
    LayerNorm,
    Lora,
    LowRankAdapter,
    Oft,
    Prefix,
    Prompt,
    PTuning,
    TrainableTokens,
    Vera,
)


def parameters(spec: Any, shapes: Sequence[tuple[int, ...]], hidden: int, layers: int) -> int:
    """Return how many parameters `spec` trains in modules whose weights have these shapes.

    A shape is [out, in], [experts, out, in], [width] of a norm, or () of a block, which is taken to
    be `hidden` wide.
    It is an estimate for a plan: exact for LoRA, adapters and prompts, else within about twice.
    """
    if isinstance(spec, TrainableTokens):
        return len(spec.tokens) * hidden
    if isinstance(spec, Prefix):
        own = spec.num_virtual_tokens * 2 * layers * hidden
        width = spec.encoder_hidden_size or hidden
        inner = hidden * width + width * 2 * layers * hidden if spec.prefix_projection else 0
        return own + inner
    if isinstance(spec, Prompt | PTuning):
        own = spec.num_virtual_tokens * hidden
        if isinstance(spec, Prompt):
            return own
        width = spec.encoder_hidden_size or hidden
        return own + (hidden * width + width * width + width * hidden) * (
            4 * spec.encoder_num_layers if spec.encoder_reparameterization_type == "LSTM" else 1
        )
    return sum(_beside(spec, shape or (hidden, hidden)) for shape in shapes)


def inner_width(spec: Any, width: int) -> int:
    """Return how wide a bottleneck is beside a module of `width`."""
    return int(spec.bottleneck_dim or max(1, width // spec.reduction_factor))


def _beside(spec: Any, shape: tuple[int, ...]) -> int:
    """Return the parameters beside one module."""
    if len(shape) == 3:
        return shape[0] * _beside(spec, shape[1:])
    out, into = shape[0], shape[-1]
    if isinstance(spec, Lora):
        return spec.r * (out + into) + (out if spec.use_dora else 0)
    if isinstance(spec, AdaLora):
        return spec.init_r * (out + into + 1)
    if isinstance(spec, Ia3):
        return max(out, into)
    if isinstance(spec, Vera):
        return spec.r + out
    if isinstance(spec, Oft):
        return into * (spec.oft_block_size - 1) // 2
    if isinstance(spec, Boft):
        return into * spec.boft_block_size * spec.boft_n_butterfly_factor + out
    if isinstance(spec, LayerNorm):
        return 2 * out
    if not hasattr(spec, "bottleneck_dim"):  # BitFit
        return out
    inner = inner_width(spec, out)
    whole = 2 * out * inner
    if isinstance(spec, LowRankAdapter):
        whole = 2 * spec.low_rank_rank * (out + inner)
    elif isinstance(spec, Compacter):
        n = spec.hypercomplex_division
        whole = 2 * (spec.phm_rank * (out + inner) + n**3)
    return int(whole + out + inner)
