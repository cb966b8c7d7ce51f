"""Which modules of a model are what."""

from __future__ import annotations

from torch import nn


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by name, the output head (tied or not) left out."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def output_heads(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that make the logits."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [n for n, m in model.named_modules() if m is head and isinstance(m, nn.Linear)]
