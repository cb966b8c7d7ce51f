"""How wide what goes into a module and what comes out of it is, told without running it."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim")
"""Names under which configs give the width of what goes from block to block."""


def bare(module: nn.Module) -> nn.Module:
    """Return the module of the model that tuners have wrapped, or `module` itself."""
    while isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer: of torch, GPT-2's, or one that is quantised."""
    return hasattr(module, "nf") or (
        isinstance(getattr(module, "out_features", None), int)
        and isinstance(getattr(module, "in_features", None), int)
    )


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm with a weight for each channel."""
    weight = module._parameters.get("weight")
    return (
        "norm" in type(module).__name__.lower()
        and weight is not None
        and weight.dim() == 1
        and not is_linear(module)
    )


def output_width(module: nn.Module, config: Any = None) -> int:
    """Return the last dimension of what `module` gives, of the first tensor if it gives several.

    A leaf's is its shape's. A block's is a width that the model's `config` calls the hidden one:
    that of the last linear layer inside which has such a width. Raises ValueError for a module
    whose width can't be told.
    """
    module = bare(module)
    if is_linear(module):
        return _int(getattr(module, "nf", None) or module.out_features)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if is_norm(module):
        return len(module._parameters["weight"])  # type: ignore[arg-type]  # is_norm has looked
    return _of_block(module, config)


def input_width(module: nn.Module, config: Any = None) -> int:
    """Return the last dimension of what `module` reads, of the first tensor if it reads several.

    A block's is that of its first linear layer, and without one the width of what it gives. Raises
    ValueError as `output_width` does, and for an embedding.
    """
    module = bare(module)
    if is_linear(module):
        return _int(getattr(module, "nx", None) or module.in_features)
    if isinstance(module, nn.Embedding):
        raise ValueError("an embedding takes numbers of tokens, which an adapter can't read")
    first = next((m for m in _parts(module) if is_linear(m)), None)
    return output_width(module, config) if first is None else input_width(first)


def _of_block(module: nn.Module, config: Any) -> int:
    inner = _parts(module)
    if not inner:
        raise ValueError(f"the width of what {type(module).__name__} gives can't be told")
    widths = [output_width(m) for m in inner if is_linear(m)]
    hidden = _hidden(config)
    known = [w for w in widths if w in hidden] or [
        w for m in inner if is_norm(m) and (w := output_width(m)) in hidden
    ]
    if known:
        return known[-1]
    if len(hidden) == 1:
        return hidden.pop()
    if widths and not hidden:
        return widths[-1]
    raise ValueError(f"the width of what {type(module).__name__} gives can't be told")


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return what is inside a block, without what tuners have put there."""
    found = []
    for child in module.children():
        base = bare(child)
        if not isinstance(base, BaseTunerLayer):
            found += [base, *_parts(base)]
    return found


def _hidden(config: Any) -> set[int]:
    """Return the hidden widths that a config and the configs inside it name."""
    if config is None:
        return set()
    found = {w for name in HIDDEN if isinstance(w := getattr(config, name, None), int)}
    for name in getattr(config, "sub_configs", None) or {}:
        found |= _hidden(getattr(config, name, None))
    return found


def _int(value: Any) -> int:
    return int(value)
