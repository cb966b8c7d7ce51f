"""Trained rows in a directory: `soft_rows.safetensors`, and what they are in `soft_rows.json`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bmkit.deltas import soft_rows
from bmkit.deltas.soft_rows import SoftRows
from bmkit.errors import InputError, first_line
from bmkit.model import save_tensors
from bmkit.plan import read_json
from bmkit.prompting.encode import SoftRow

WEIGHTS, ABOUT = "soft_rows.safetensors", "soft_rows.json"
OTHER = "was it trained on another base?"


def save(model: Any, folder: Path) -> None:
    """Write a model's rows, as their encoder makes them; a few kilobytes.

    Raises InputError if it has none.
    """
    soft = soft_rows.require(model)
    with torch.no_grad():
        rows = soft().detach().clone()
    about = {
        "count": len(rows),
        "width": rows.shape[1],
        "vocabulary": soft.start,
        "rows": [asdict(row) for row in soft.about],
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, {"rows": rows})
    text = json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / ABOUT).write_text(text, encoding="utf-8")


def read(folder: Path) -> tuple[Tensor, int, tuple[SoftRow, ...]]:
    """Return saved rows [rows, width], the id of the first, and what each is.

    Raises InputError for files that are missing or damaged.
    """
    for name in (WEIGHTS, ABOUT):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no trained tokens", hint=f"they need {name}")
    about = read_json(folder / ABOUT)
    try:
        rows = load_file(folder / WEIGHTS)["rows"]
        known = tuple(SoftRow(**row) for row in about["rows"])
        start = int(about["vocabulary"])
    except (SafetensorError, KeyError, TypeError, ValueError) as exc:
        raise InputError(f"{folder}: its trained tokens are damaged: {first_line(exc)}") from None
    if rows.dim() != 2 or len(rows) != len(known):
        raise InputError(f"{folder}: {WEIGHTS} and {ABOUT} don't belong together")
    return rows, start, known


def load(model: Any, folder: Path) -> SoftRows:
    """Give a model saved rows, frozen; return them.

    Raises InputError for files that are damaged, or made for another vocabulary or width, and
    RecipeError as `soft_rows.add` does.
    """
    rows, start, known = read(folder)
    table = soft_rows.table_of(model)
    pairs = (
        ("behind a vocabulary of", start, table.num_embeddings),
        ("of width", rows.shape[1], table.embedding_dim),
    )
    for what, there, here in pairs:
        if there != here:
            said = f"{folder}: its tokens were trained {what} {there}, and this model's is {here}"
            raise InputError(said, hint=OTHER)
    soft = SoftRows(start, rows.to(table.weight.device), known).requires_grad_(False)
    soft_rows.attach(model, soft)
    return soft
