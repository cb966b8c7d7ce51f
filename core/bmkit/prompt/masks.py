"""What a model says at the masks of prompts, in one pass: its logits, or the states before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmkit.prompting.encode import Encoded, Kind
from bmkit.verbalizers.positions import logits_at, pad_of, padded, states_at

Places = tuple[dict[str, Any], int, Tensor, Tensor]


def logits(model: Any, prompts: Sequence[Encoded], kind: Kind) -> Tensor:
    """Return the logits at masks, [rows, vocabulary]. What is behind a causal mask isn't read."""
    return logits_at(model, *_places(model, prompts, kind))


def states(model: Any, prompts: Sequence[Encoded], kind: Kind) -> Tensor:
    """Return what the head reads at masks, [rows, hidden_size]."""
    return states_at(model, *_places(model, prompts, kind))


def all_logits(model: Any, prompts: Sequence[Encoded], kind: Kind) -> Tensor:
    """Return the logits at every mask, [rows, masks, vocabulary], of prompts with as many masks."""
    inputs, width, rows, _ = _places(model, prompts, kind)
    columns = torch.tensor([at for prompt in prompts for at in prompt.reads], device=rows.device)
    count = len(prompts[0].reads)
    found = logits_at(model, inputs, width, rows.repeat_interleave(count), columns)
    return found.view(len(prompts), count, -1)


def _places(model: Any, prompts: Sequence[Encoded], kind: Kind) -> Places:
    pad, device = pad_of(model), model.device
    ids, mask = padded([prompt.ids for prompt in prompts], pad, device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    width = ids.shape[1]
    if kind == "seq2seq":
        said, _ = padded([prompt.decoder_ids for prompt in prompts], pad, device)
        inputs["decoder_input_ids"] = said
        width = said.shape[1]
    if kind != "masked":
        inputs["use_cache"] = False
    columns = torch.tensor([prompt.reads[0] for prompt in prompts], device=device)
    return inputs, width, torch.arange(len(prompts), device=device), columns
