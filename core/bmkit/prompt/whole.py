"""The model that a prompt has of its own, after the whole of it was trained with the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bmkit import model as models
from bmkit.deltas import soft_rows
from bmkit.deltas.held import base_of
from bmkit.plan import read_json


@torch.no_grad()
def as_stored(model: Any, checkpoint: Path) -> None:
    """Round a model's weights, in place, to the dtype that `write` keeps them in.

    So it says from now on what it will say when it is opened again. Trained tokens stay.
    """
    stored = models.stored_dtype(models.load_config(checkpoint))
    rows = soft_rows.of(model)
    apart = {id(p) for p in rows.parameters()} if rows is not None else set()
    for parameter in base_of(model).parameters():
        if id(parameter) not in apart and parameter.is_floating_point():
            parameter.copy_(parameter.to(stored))


def write(model: Any, checkpoint: Path, folder: Path) -> None:
    """Write a model that was made of `checkpoint` as a checkpoint, which plain transformers loads.

    Trained tokens aren't among its weights.
    """
    base = base_of(model)
    rows = soft_rows.detach(base) if soft_rows.of(base) is not None else None
    folder.mkdir(parents=True)
    models.save(base, checkpoint, folder)
    if rows is not None:
        soft_rows.attach(base, rows)
    config = folder / "config.json"
    values = read_json(config) | {"architectures": [type(base).__name__]}
    config.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
