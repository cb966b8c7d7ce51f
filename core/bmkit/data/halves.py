"""Rows of what an encoder-decoder reads and says, and of text to fill gaps in -> token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmkit.data import rows
from bmkit.data.chat import IGNORED, Encoded, Example
from bmkit.errors import InputError


def encode_halves(path: Path, tokenizer: Any, *, max_length: int) -> Encoded:
    """Tokenise rows of `prompt` and `completion`: what is read, and what is to be said behind it.

    Either is cut at `max_length` tokens. Raises InputError naming the file and line.
    """
    end = tokenizer.eos_token_id
    examples: list[Example] = []
    truncated = dropped = 0
    for row in rows.read_all(path):
        prompt, said = row.values.get("prompt"), row.values.get("completion")
        if not isinstance(prompt, str) or not isinstance(said, str):
            problem = rows.unknown_shape(row.values, rows.WANTED["seq2seq_lm"])
            raise InputError(f"{path}:{row.line}: {problem}")
        try:
            texts = [rows.require_text(text) for text in (prompt, said)]
        except ValueError as exc:
            raise InputError(f"{path}:{row.line}: {exc}") from None
        read, labels = (
            tokenizer(texts[0])["input_ids"],
            tokenizer(text_target=texts[1])["input_ids"],
        )
        if end is not None and labels[-1:] != [end]:
            labels = [*labels, end]
        truncated += max(len(read), len(labels)) > max_length
        if not read or not labels:
            dropped += 1
            continue
        examples.append({"input_ids": read[:max_length], "labels": labels[:max_length]})
    if not examples:
        raise InputError(f"{path}: no row has both a prompt and a completion")
    return Encoded(examples, truncated, dropped)


def encode_plain(path: Path, tokenizer: Any, *, max_length: int) -> Encoded:
    """Tokenise rows of `text`, in pieces of `max_length` with the tokenizer's own ends.

    `labels` is 0 where a token may be hidden and to be found again. Raises InputError naming the
    file and line.
    """
    examples: list[Example] = []
    for row in rows.read_all(path):
        text = row.values.get("text")
        if not isinstance(text, str):
            raise InputError(f"{path}:{row.line}: {rows.unknown_shape(row.values, '`text`')}")
        try:
            found = tokenizer(
                rows.require_text(text),
                truncation=True,
                max_length=max_length,
                return_overflowing_tokens=True,
                return_special_tokens_mask=True,
            )
        except ValueError as exc:
            raise InputError(f"{path}:{row.line}: {exc}") from None
        for ids, special in zip(found["input_ids"], found["special_tokens_mask"], strict=True):
            labels = [IGNORED if mark else 0 for mark in special]
            if 0 in labels:
                examples.append({"input_ids": ids, "labels": labels})
    if not examples:
        raise InputError(f"{path}: no row has any text")
    return Encoded(examples, 0, 0)
