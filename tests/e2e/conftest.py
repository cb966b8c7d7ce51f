"""What end-to-end tests of tuning share: rows, and small models of other kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig

COLOURS = ("red", "green", "blue")


def splits(folder: Path, rows: list[dict[str, Any]], first: int) -> Path:
    """Write the first rows as `train.jsonl`, the others as `dev.jsonl`."""
    folder.mkdir()
    for name, part in (("train", rows[:first]), ("dev", rows[first:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def with_tokenizer(tiny: Path) -> Callable[[Path], None]:
    """Copy the tiny checkpoint's tokenizer to another one."""

    def copy(to: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / name, to / name)

    return copy


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of rows to say: `train.jsonl` and `dev.jsonl`."""
    rows = [{"prompt": f"Number {i}?", "completion": f"It is {i}."} for i in range(48)]
    return splits(tmp_path / "say", rows, 32)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder of texts with one of three labels, which their first word tells."""
    rows = [{"text": f"{COLOURS[i % 3]} {i}", "label": COLOURS[i % 3]} for i in range(72)]
    return splits(tmp_path / "tell", rows, 48)


@pytest.fixture
def bert(with_tokenizer: Callable[[Path], None], tmp_path: Path) -> Path:
    """A random BERT with a head that fills gaps, and the tiny tokenizer with a mask token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=400, num_attention_heads=4, **sizes)  # type: ignore[arg-type]
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    with_tokenizer(tmp_path / "bert")
    file = tmp_path / "bert" / "tokenizer_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "mask_token": "<|im_start|>"}))
    return tmp_path / "bert"
