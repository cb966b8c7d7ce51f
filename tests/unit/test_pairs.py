"""Pairs of answers: one that says nothing of what is better is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bmkit.data.pairs import encode_pairs
from bmkit.errors import InputError

APART = {"prompt": "a", "chosen": "yes", "rejected": "no"}
ALIKE = {"prompt": "a", "chosen": "yes", "rejected": "yes"}


def write(folder: Path, *rows: dict[str, str]) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_pair_of_equal_answers_is_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path, APART, ALIKE)
    found = encode_pairs(file, tokenizer, max_length=64, raw=True)
    assert (len(found.examples), found.dropped) == (1, 1)
    assert tokenizer.decode(found.examples[0]["rejected_ids"]).startswith("ano")


def test_pairs_that_are_all_equal_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="two answers that differ"):
        encode_pairs(write(tmp_path, ALIKE), tokenizer, max_length=64, raw=True)
