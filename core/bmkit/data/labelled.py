"""Rows with labels, of a text or of each of its words -> token ids and label numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmkit.data import rows
from bmkit.data.chat import IGNORED, Encoded, Example
from bmkit.errors import InputError, did_you_mean


def labels_of(path: Path) -> list[str]:
    """Return the labels that a file of labelled rows has, sorted: `label`, or those of `tags`, or
    of `probabilities`.

    Raises InputError naming the file and line of a row without them, or if there is only one.
    """
    found: set[str] = set()
    for row in rows.read_all(path):
        try:
            found.update(_named(row.values))
        except ValueError as exc:
            raise InputError(f"{path}:{row.line}: {exc}") from None
    if len(found) < 2:
        raise InputError(
            f"{path} has one label only, `{next(iter(found), '')}`: there is nothing to tell apart",
            hint="name all of them in data.labels",
        )
    return sorted(found, key=lambda label: (len(label), label) if label.isdigit() else (0, label))


def encode_texts(path: Path, tokenizer: Any, labels: Sequence[str], *, max_length: int) -> Encoded:
    """Tokenise rows of `text`, perhaps `text_pair`, and `label` or `probabilities` of labels.

    Examples hold `input_ids` and what else the tokenizer gives, and `label`, a number; if a row has
    probabilities, all have `probabilities`, one for each label. Longer texts are cut, the longer of
    a pair first. Raises InputError naming the file and line.
    """
    known = {label: number for number, label in enumerate(labels)}
    examples: list[dict[str, Any]] = []
    truncated = 0
    for row in rows.read_all(path):
        try:
            label = _label(known, row.values)
            texts = [rows.require_text(text) for text in _texts(row.values)]
        except ValueError as exc:
            raise InputError(f"{path}:{row.line}: {exc}") from None
        cut = tokenizer(*texts, truncation=True, max_length=max_length)
        truncated += len(cut["input_ids"]) == max_length and (
            len(tokenizer(*texts)["input_ids"]) > max_length
        )
        if not cut["input_ids"]:
            raise InputError(f"{path}:{row.line}: the text is empty")
        examples.append({**{k: list(v) for k, v in cut.items()}, **label})
    if any("probabilities" in example for example in examples):
        for example in examples:
            if "label" in example:
                (number,) = example.pop("label")
                example["probabilities"] = [float(at == number) for at in range(len(labels))]
    return Encoded(examples, truncated, 0)


def _label(known: dict[str, int], values: dict[str, Any]) -> dict[str, Any]:
    """Return a row's label as a number, or how likely each label is, in their order.

    Raises ValueError for a row that has neither, or for probabilities that are none.
    """
    if "probabilities" not in values:
        (label,) = _named(values)
        return {"label": [_number(known, label)]}
    shares = [0.0] * len(known)
    for label, share in _probabilities(values).items():
        shares[_number(known, label)] = share
    return {"probabilities": [share / sum(shares) for share in shares]}


def _probabilities(values: dict[str, Any]) -> dict[str, float]:
    """Return a row's `probabilities`. Raises ValueError if they are none, or don't make 1."""
    given: Any = values["probabilities"]
    if not isinstance(given, dict) or not given:
        raise ValueError("`probabilities` takes labels, each with how likely it is")
    for label, share in given.items():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 <= share <= 1 + SLACK:
            raise ValueError(f"`probabilities`: `{label}` has `{share}`, which is none")
    if abs(sum(given.values()) - 1) > SLACK:
        raise ValueError(f"`probabilities` make {sum(given.values()):g} together, not 1")
    return {label: float(share) for label, share in given.items()}


SLACK = 0.02
"""How far probabilities may be from 1 together: they are rounded."""


def encode_words(path: Path, tokenizer: Any, labels: Sequence[str], *, max_length: int) -> Encoded:
    """Tokenise rows of `tokens` (words) and `tags`, one each.

    The first token of a word has its label, the others bear no loss. Words behind `max_length`
    tokens are cut. Raises InputError naming the file and line.
    """
    known = {label: number for number, label in enumerate(labels)}
    examples: list[Example] = []
    truncated = dropped = 0
    for row in rows.read_all(path):
        try:
            numbers = [_number(known, tag) for tag in _named(row.values)]
            words = [rows.require_text(word) for word in row.values["tokens"]]
        except ValueError as exc:
            raise InputError(f"{path}:{row.line}: {exc}") from None
        cut = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        places = cut.word_ids()
        own = [
            IGNORED if word is None or word == before else numbers[word]
            for word, before in zip(places, [None, *places], strict=False)
        ]
        truncated += len(words) - 1 > max((w for w in places if w is not None), default=-1)
        if all(label == IGNORED for label in own):
            dropped += 1
            continue
        examples.append({**{k: list(v) for k, v in cut.items()}, "labels": own})
    if not examples:
        raise InputError(f"{path}: no row has a word within {max_length} tokens")
    return Encoded(examples, truncated, dropped)


def _named(values: dict[str, Any]) -> list[str]:
    """Return the labels that a row tells of. Raises ValueError if there are none."""
    if "tags" in values or "tokens" in values:
        words: Any = values.get("tokens")
        tags: Any = values.get("tags")
        lists = isinstance(words, list) and isinstance(tags, list) and bool(tags)
        if not lists or not all(isinstance(word, str) for word in words):
            raise ValueError("it needs `tokens`, a list of words, and `tags`, one for each")
        if len(words) != len(tags):
            raise ValueError(f"it has {len(words)} `tokens` and {len(tags)} `tags`")
        return [_text(tag) for tag in tags]
    if "probabilities" in values:
        return list(_probabilities(values))
    if "label" not in values:
        raise ValueError(rows.unknown_shape(values, "`text`, `label`"))
    return [_text(values["label"])]


def _text(label: Any) -> str:
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(f"`{label}` is no label: it takes text or a whole number")
    return str(label)


def _texts(values: dict[str, Any]) -> list[str]:
    found = [values[key] for key in ("text", "text_pair") if key in values]
    if not isinstance(values.get("text"), str) or not all(isinstance(t, str) for t in found):
        raise ValueError(rows.unknown_shape(values, "`text`, `label`"))
    return found


def _number(known: dict[str, int], label: str) -> int:
    if label not in known:
        close = did_you_mean(label, known, otherwise=f"there are {', '.join(known)}")
        raise ValueError(f"`{label}` is none of the labels: {close}")
    return known[label]
