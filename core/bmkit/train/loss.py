"""Cross-entropy of the labelled tokens, with logits made only where there is a label."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.data.chat import IGNORED
from bmkit.train import head as heads
from bmkit.train.head import Head

BESIDE = frozenset({"labels", "weights", "decisions", "row", "row_tokens"})
"""What a batch holds beside the model's inputs."""


def next_token_loss(
    model: Any, batch: dict[str, Tensor], *, head: Head | None = None
) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of `batch["labels"]` [batch, time], and how many there are.

    Each counts by `batch["weights"]` [batch, time], if there are any. Position t predicts the label
    at t + 1. With the model's `head` (`train.head.find`), it runs at
    the labelled positions alone, and no logits are kept if it is linear. Without, the model makes
    its own logits, at positions where some row has a label (`logits_to_keep`), if its forward can
    do that.
    """
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name not in BESIDE}
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # [batch, time]
    there = targets != IGNORED
    weights = batch.get("weights")
    if weights is not None:
        weights = functional.pad(weights[:, 1:], (0, 1))
    if head is not None:
        hidden = head.read(model, {**inputs, "use_cache": False})
        weighed = None if weights is None else weights[there]
        return head.cross_entropy(hidden[there], targets[there], weighed), int(there.sum())
    keep = there.any(0).nonzero().squeeze(-1)  # [kept]
    if keeps_some(model):
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits
        logits = logits[:, logits.shape[1] - labels.shape[1] + keep]  # virtual tokens are in front
    each = functional.cross_entropy(
        logits.flatten(0, 1).float(),
        targets[:, keep].flatten(),
        ignore_index=IGNORED,
        reduction="sum" if weights is None else "none",
    )
    loss = each if weights is None else (each * weights[:, keep].flatten()).sum()
    return loss, int(there.sum())


def keeps_some(model: Any) -> bool:
    """Tell whether `model` takes `logits_to_keep` for a row's own positions, wrapped or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if heads.prompted(model):
        return False  # it may put tokens of its own in front
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@torch.no_grad()
def mean_loss(model: Any, batches: list[dict[str, Tensor]], device: torch.device) -> float:
    """Return the mean cross-entropy over all labelled tokens of `batches`."""
    total, count = 0.0, 0
    training = model.training
    model.eval()
    head = heads.find(model)
    for batch in batches:
        given = {k: v.to(device) for k, v in batch.items()}
        loss, labelled = next_token_loss(model, given, head=head)
        total += float(loss)
        count += labelled
    model.train(training)
    return total / max(count, 1)
