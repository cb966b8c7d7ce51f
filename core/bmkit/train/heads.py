"""Losses of models that say labels, fill gaps, or say what follows from something read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.data.chat import IGNORED


def label_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of `batch["labels"]`, and how many there are.

    Labels are [batch], of whole texts, or [batch, time], of tokens.
    """
    logits, labels = said(model, batch)
    return functional.cross_entropy(logits, labels, reduction="sum"), len(labels)


def said(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits [count, classes] in float32 where there is a label, and the labels.

    Virtual tokens that stand in front of a text's own have none.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
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
        logits, labels = said(model, {k: v.to(device) for k, v in batch.items()})
        total += float(functional.cross_entropy(logits, labels, reduction="sum"))
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
