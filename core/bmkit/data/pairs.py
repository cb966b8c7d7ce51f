"""Rows of a prompt with a better and a worse answer -> token ids and labels of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmkit.data import chat, rows
from bmkit.data.batch import Padding
from bmkit.data.chat import IGNORED, Encoded, Example
from bmkit.errors import InputError

SIDES = ("chosen", "rejected")


def encode_pairs(path: Path, tokenizer: Any, *, max_length: int, raw: bool) -> Encoded:
    """Tokenise rows of `prompt`, `chosen` and `rejected`, by the chat template if there is one.

    Examples hold `input_ids` and `labels` of the chosen answer, and `rejected_ids` and
    `rejected_labels`. A pair of which one has nothing left to say within `max_length` tokens is
    dropped, and one whose answers are the same. Raises InputError naming the file and line.
    """
    examples: list[Example] = []
    truncated = dropped = 0
    for row in rows.read_all(path):
        parts = []
        for side in SIDES:
            values = {"prompt": row.values.get("prompt"), "completion": row.values.get(side)}
            if not all(isinstance(text, str) for text in values.values()):
                problem = rows.unknown_shape(row.values, rows.WANTED["preference"])
                raise InputError(f"{path}:{row.line}: {problem}")
            try:
                parts.append(chat.labelled(tokenizer, values, raw=raw))
            except ValueError as exc:
                raise InputError(f"{path}:{row.line}: {exc}") from None
        truncated += any(len(ids) > max_length for ids, _ in parts)
        cut = [(ids[:max_length], labels[:max_length]) for ids, labels in parts]
        bare = any(all(label == IGNORED for label in labels) for _, labels in cut)
        if bare or cut[0] == cut[1]:
            dropped += 1
            continue
        (ids, labels), (other, other_labels) = cut
        example = {"input_ids": ids, "labels": labels, "rejected_ids": other}
        examples.append({**example, "rejected_labels": other_labels})
    if not examples:
        raise InputError(
            f"{path}: no pair has two answers that differ within {max_length} tokens",
            hint="raise data.max_length, or look at the rows",
        )
    return Encoded(examples, truncated, dropped)


@dataclass(frozen=True)
class Pairs:
    """A collator of pairs: the chosen answers of a batch, then the rejected ones."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `targets` [2 batch, time], `labels` [batch].

        `labels` is 0 for each pair, for what counts them; `reference` [2 batch] are the logarithms
        of what the model began with, if the examples have them.
        """
        both = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples]
        both += [{"input_ids": e["rejected_ids"], "labels": e["rejected_labels"]} for e in examples]
        batch = Padding(self.pad_token_id)(both)
        batch["targets"] = batch.pop("labels")
        batch["labels"] = torch.zeros(len(examples), dtype=torch.long)
        if "reference" in examples[0]:
            told = [e["reference"][side] for side in (0, 1) for e in examples]
            batch["reference"] = torch.tensor(told, dtype=torch.float32)
        return batch
