"""Cross-entropy of the labelled tokens, with logits made only where there is a label."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.data.chat import IGNORED


def next_token_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of `batch["labels"]` [batch, time], and how many there are.

    Position t predicts the label at t + 1. The output head runs only at positions where some row
    has a label (`logits_to_keep`), where the model's forward can do that: with masked prompts this
    saves most of the head's time and memory.
    """
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # [batch, time]
    keep = (targets != IGNORED).any(0).nonzero().squeeze(-1)  # [kept]
    if keeps_some(model):
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, keep]
    targets = targets[:, keep]
    loss = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((targets != IGNORED).sum())


def keeps_some(model: Any) -> bool:
    """Tell whether `model` takes `logits_to_keep`, looking through a PEFT wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@torch.no_grad()
def mean_loss(model: Any, batches: list[dict[str, Tensor]], device: torch.device) -> float:
    """Return the mean cross-entropy over all labelled tokens of `batches`."""
    total, count = 0.0, 0
    training = model.training
    model.eval()
    for batch in batches:
        loss, labelled = next_token_loss(model, {k: v.to(device) for k, v in batch.items()})
        total += float(loss)
        count += labelled
    model.train(training)
    return total / max(count, 1)
