"""Rows that a prompt has labelled, for `bmkit tune`: their text, and how likely each label is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bmkit.data.tabular import Record
from bmkit.errors import InputError, RecipeError
from bmkit.prompt.ready import Ready
from bmkit.prompting.wrap import as_text

FILE = "train.jsonl"
"""Among an artifact's files, as a directory of splits has it: `--data` takes the artifact."""
KEYS = ("text", "text_pair")


def fields(ready: Sequence[Ready]) -> list[str]:
    """Return the fields of templates that become `text` and `text_pair`, in their order.

    Raises RecipeError if there are more: a classifier reads two texts at most.
    """
    found = list(dict.fromkeys(name for one in ready for name in one.prompts.fields))
    if not 0 < len(found) <= len(KEYS):
        raise RecipeError(
            f"data.unlabelled: the template has {len(found)} fields, and a classifier reads one "
            "text or two",
            hint="leave data.unlabelled out",
        )
    return found


def write(
    folder: Path,
    records: Sequence[Record],
    names: Sequence[str],
    labels: Sequence[str],
    logprobs: Tensor,
) -> None:
    """Write rows with the probabilities of their labels, by log-probabilities [rows, labels]."""
    lines = []
    for record, row in zip(records, logprobs.exp().tolist(), strict=True):
        said = {key: _text(record, name) for key, name in zip(KEYS, names, strict=False)}
        shares = {label: round(share, 6) for label, share in zip(labels, row, strict=True)}
        lines.append(json.dumps({**said, "probabilities": shares}, ensure_ascii=False) + "\n")
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def _text(record: Record, name: str) -> str:
    meta = record.values.get("meta")
    value = record.values.get(name, meta.get(name) if isinstance(meta, dict) else None)
    try:
        return as_text(value)
    except ValueError as exc:
        raise InputError(f"{record.where}: `{name}`: {exc}") from None
