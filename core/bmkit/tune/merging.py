"""Put saved deltas into a model's weights, or several into one delta."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bmkit import model as models
from bmkit import plan
from bmkit.deltas import arithmetic, compose
from bmkit.deltas.merge import merge
from bmkit.errors import InputError
from bmkit.nn.zeros import is_pruned
from bmkit.runtime import heads
from bmkit.runtime.heads import Head


def merged(checkpoint: Path, folders: Mapping[str, Path], out: Path) -> None:
    """Write the model at `checkpoint` with deltas in its weights, in its own dtype.

    Peak memory: the dense model in float32. Raises InputError for deltas that don't fit,
    RecipeError for one that has no place in weights.
    """
    found = {head for path in folders.values() if (head := heads.read(path))}
    if len(found) > 1:
        raise InputError("these adapters were trained with different labels or tasks")
    cpu = torch.device("cpu")
    if found:
        (head,) = found
        config = heads.config_of(checkpoint, head, models.load_tokenizer(checkpoint))
        model, _ = heads.load(checkpoint, config, device=cpu, dtype="float32")
    else:
        head = None
        model = models.load_model(checkpoint, device=cpu, dtype="float32")
    pruned = [n for n, p in model.named_parameters() if is_pruned(p)]
    whole = merge(compose.load(model, folders))
    named = dict(whole.named_parameters())
    if filled := [name for name in pruned if not is_pruned(named[name])]:
        raise InputError(
            f"{checkpoint} is pruned, and merging fills the zeros of {len(filled)} matrices, as "
            f"{filled[0]}",
            hint="train LoRA with `merge: true`, which keeps them, or keep the delta beside it",
        )
    write_whole(whole, checkpoint, out, head)


def write_whole(model: Any, checkpoint: Path, out: Path, head: Head | None) -> None:
    """Write a model that was made of `checkpoint`, with the head that it has by now."""
    models.save(model, checkpoint, out)
    values = plan.read_json(out / "config.json")
    rows = int(model.get_input_embeddings().weight.shape[0])
    text = next((v for v in values.values() if isinstance(v, dict) and "vocab_size" in v), values)
    grown = text.get("vocab_size", rows) < rows
    if grown:
        text["vocab_size"] = rows
    if head is None and not grown:
        return
    if head is None:
        _write(out, values)
        return
    values["architectures"] = model.config.architectures
    if head.labels:
        values["id2label"] = dict(enumerate(head.labels))
        values["label2id"] = {label: number for number, label in enumerate(head.labels)}
        values["pad_token_id"] = model.config.get_text_config().pad_token_id
    _write(out, values)


def _write(out: Path, values: Mapping[str, Any]) -> None:
    (out / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def summed(folders: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Write the LoRA delta whose update is the weighted sum of others, exactly.

    Raises InputError for other deltas, or those of different bases.
    """
    arithmetic.weighted(folders, weights, out)
