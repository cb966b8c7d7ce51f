"""Losses of models that say labels, fill gaps, or say what follows from something read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.data.chat import IGNORED


def label_loss(
    model: Any, batch: dict[str, Tensor], temperature: float = 1.0
) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of `batch["labels"]`, and how many there are.

    Labels are [batch], of whole texts, or [batch, time], of tokens. If there are `probabilities`
    [batch, classes], it is theirs: they, and what the model says, are made flatter by
    `temperature`, and the loss is multiplied by its square (arXiv 1503.02531).
    """
    logits, labels = said(model, batch)
    return _cross_entropy(logits, labels, batch.get("probabilities"), temperature), len(labels)


def _cross_entropy(
    logits: Tensor, labels: Tensor, shares: Tensor | None, temperature: float = 1.0
) -> Tensor:
    if shares is None:
        return functional.cross_entropy(logits, labels, reduction="sum")
    flat = shares ** (1 / temperature)
    flat = flat / flat.sum(-1, keepdim=True)
    loss = functional.cross_entropy(logits / temperature, flat, reduction="sum")
    return temperature**2 * loss


def said(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits [count, classes] in float32 where there is a label, and the labels.

    Virtual tokens that stand in front of a text's own have none.
    """
    apart = ("labels", "probabilities")
    inputs = {name: value for name, value in batch.items() if name not in apart}
    logits, labels = model(**inputs).logits, batch["labels"]
    if logits.ndim == 3:
        logits = logits[:, logits.shape[1] - labels.shape[1] :]
        there = labels != IGNORED
        logits, labels = logits[there], labels[there]
    return logits.float(), labels


@torch.no_grad()
def label_figures(
    model: Any, batches: Sequence[dict[str, Tensor]], device: torch.device, classes: int
) -> dict[str, float]:
    """Return mean loss, accuracy, and the mean F1 of all classes (macro), by `dev_` names.

    A class that is neither there nor said counts for nothing.
    """
    total, whole = 0.0, 0
    counts = torch.zeros(classes, classes)  # [true, said]
    for batch in batches:
        here = {name: value.to(device) for name, value in batch.items()}
        logits, labels = said(model, here)
        total += float(_cross_entropy(logits, labels, here.get("probabilities")))
        whole += len(labels)
        pairs = (labels * classes + logits.argmax(-1)).cpu()
        counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    right = counts.diagonal()
    present = (counts.sum(0) + counts.sum(1)) > 0
    f1 = 2 * right / (counts.sum(0) + counts.sum(1)).clamp_min(1)
    return {
        "dev_loss": total / max(whole, 1),
        "dev_accuracy": float(right.sum()) / max(whole, 1),
        "dev_f1": float(f1[present].mean()) if present.any() else 0.0,
    }
