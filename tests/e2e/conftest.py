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


WORDS = (
    *("person", "city", "place", "parent", "child", "lives", "born", "of", "in", "nothing", "the"),
    *("Ann", "Bob", "Rome", "Oslo", "visits", "near", "is", "was", "it", "x", ",", "."),
)
SENTINELS = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>", "<mask>", *SENTINELS)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def _tokenizer(kind: str) -> Any:
    """A tokenizer with one token for each word of WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"masked": "<s> $A </s>", "t5": "$A </s>", "causal": "$A"}[kind]
    bare.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[("</s>", 1), ("<s>", 2)]
    )
    given = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    given |= {"mask_token": "<mask>"} if kind == "masked" else {}
    more = list(SENTINELS) if kind == "t5" else []
    return PreTrainedTokenizerFast(tokenizer_object=bare, **given, extra_special_tokens=more)


@pytest.fixture
def promptable(tmp_path: Path) -> Callable[[str], Path]:
    """Make a random model of a kind (masked, causal, t5), whose tokens are words."""
    return lambda kind: _promptable(kind, tmp_path / "asked")


def _promptable(kind: str, path: Path) -> Path:
    import transformers

    torch.manual_seed(3)
    known = _tokenizer(kind)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": len(known)}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config: Any = transformers.T5Config(**sizes, **ids, decoder_start_token_id=0)
        made: Any = transformers.T5ForConditionalGeneration
    else:
        wide = {"num_attention_heads": 4, "initializer_range": 0.3}
        built = "Llama" if kind == "causal" else "Bert"
        config = getattr(transformers, f"{built}Config")(**SIZES, **ids, **wide)
        made = getattr(transformers, f"{built}For{'CausalLM' if kind == 'causal' else 'MaskedLM'}")
    made(config).save_pretrained(path)
    known.save_pretrained(path)
    return path
