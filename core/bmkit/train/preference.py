"""Learning which of two answers is better, by how likely the model itself finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.data.chat import IGNORED, Example
from bmkit.data.pairs import Pairs
from bmkit.train import head as heads
from bmkit.train.head import Head


def likelihoods(model: Any, batch: dict[str, Tensor], head: Head | None) -> Tensor:
    """Return the log-probability of each row's labelled tokens together, float32 [rows].

    With the model's `head`, logits are made at these tokens alone.
    """
    targets = functional.pad(batch["targets"][:, 1:], (0, 1), value=IGNORED)  # [rows, time]
    there = targets != IGNORED
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if head is not None:
        hidden = head.read(model, {**inputs, "use_cache": False})
        logits = head.logits(hidden[there])
    else:
        whole = model(**inputs, use_cache=False).logits
        logits = whole[:, whole.shape[1] - targets.shape[1] :][there]
    told = logits.float().log_softmax(-1).gather(1, targets[there][:, None]).squeeze(1)
    row = there.nonzero()[:, 0]
    return told.new_zeros(len(targets)).index_add(0, row, told)


def preference_loss(
    model: Any, batch: dict[str, Tensor], *, beta: float, head: Head | None = None
) -> tuple[Tensor, int]:
    """Return the summed loss log(1 + exp(-β·margin)) of a batch of pairs, and how many there are.

    (Direct Preference Optimization, arXiv 2305.18290.)
    """
    margins = margin(model, batch, head)
    return -functional.logsigmoid(beta * margins).sum(), len(margins)


def margin(model: Any, batch: dict[str, Tensor], head: Head | None) -> Tensor:
    """Return by how much more the chosen answer has gained than the rejected one [pairs].

    A gain is the log-probability of an answer beyond that of `batch["reference"]`.
    """
    gain = likelihoods(model, batch, head) - batch["reference"]
    chosen, rejected = gain.chunk(2)
    return chosen - rejected


@torch.no_grad()
def with_reference(
    model: Any, examples: Sequence[Example], collate: Pairs, size: int, device: torch.device
) -> list[Any]:
    """Return `examples`, each with what the model as it is says of both answers: `reference`."""
    training = model.training
    model.eval()
    head, found = heads.find(model), []
    for low in range(0, len(examples), size):
        part = examples[low : low + size]
        batch = {name: value.to(device) for name, value in collate(part).items()}
        told = likelihoods(model, batch, head).tolist()
        for i, example in enumerate(part):
            found.append({**example, "reference": [told[i], told[i + len(part)]]})
    model.train(training)
    return found


@torch.no_grad()
def preference_figures(
    model: Any, batches: Sequence[dict[str, Tensor]], device: torch.device, beta: float
) -> dict[str, float]:
    """Return the mean loss of pairs, and the share of them whose chosen answer has gained more."""
    head, total, right, count = heads.find(model), 0.0, 0.0, 0
    for batch in batches:
        margins = margin(model, {k: v.to(device) for k, v in batch.items()}, head)
        total -= float(functional.logsigmoid(beta * margins).sum())
        right += float((margins > 0).sum()) + 0.5 * float((margins == 0).sum())
        count += len(margins)
    return {"dev_loss": total / max(count, 1), "dev_accuracy": right / max(count, 1)}
