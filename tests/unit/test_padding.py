"""What rows are filled up with never enters a loss, whichever token it is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bmkit.data.batch import Gaps, Halves, Labelled, Padding
from bmkit.data.chat import IGNORED
from bmkit.data.pairs import Pairs
from bmkit.runtime.heads import pad_of
from bmkit.train.head import find
from bmkit.train.heads import label_loss
from bmkit.train.loss import next_token_loss
from bmkit.train.preference import likelihoods

EOS, IN_THE_TEXT, ELSEWHERE = 2, 5, 39
TEXTS = [[7, 5, 5, 2], [3, 9, 5, 11, 30, 8, 5, 5, 2], [5, 2]]
PADS = pytest.mark.parametrize("pad", [EOS, IN_THE_TEXT, ELSEWHERE])
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"vocab_size": 40, "num_attention_heads": 2}


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **HEADS, initializer_range=0.3)  # type: ignore[arg-type]
    return LlamaForCausalLM(config).eval()


def bert(kind: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, **HEADS, num_labels=3, initializer_range=0.3)  # type: ignore[arg-type]
    return kind(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=40, **sizes, decoder_start_token_id=0)  # type: ignore[arg-type]
    return T5ForConditionalGeneration(config).eval()


def summed(logits: Any, labels: list[int]) -> float:
    """Return the cross-entropy of labels that are there, from logits of one row."""
    return float(functional.cross_entropy(logits, torch.tensor(labels), reduction="sum"))


@PADS
@torch.no_grad()
def test_a_decoders_rows_lose_together_what_they_lose_alone(pad: int) -> None:
    model = llama()
    rows = [{"input_ids": ids, "labels": [IGNORED, *ids[1:]]} for ids in TEXTS]
    wanted = sum(summed(model(torch.tensor([ids])).logits[0, :-1], ids[1:]) for ids in TEXTS)
    for head in (None, find(model)):
        loss, count = next_token_loss(model, Padding(pad)(rows), head=head)
        assert count == sum(len(ids) - 1 for ids in TEXTS)
        assert float(loss) == pytest.approx(wanted, rel=1e-5)


@PADS
@torch.no_grad()
def test_texts_with_a_label_lose_together_what_they_lose_alone(pad: int) -> None:
    model = bert(BertForSequenceClassification)
    rows = [{"input_ids": ids, "label": [i % 3]} for i, ids in enumerate(TEXTS)]
    loss, count = label_loss(model, Labelled(pad)(rows))
    wanted = sum(summed(model(torch.tensor([t])).logits, [i % 3]) for i, t in enumerate(TEXTS))
    assert count == 3 and float(loss) == pytest.approx(wanted, rel=1e-5)


@PADS
@torch.no_grad()
def test_tagged_words_lose_together_what_they_lose_alone(pad: int) -> None:
    model = bert(BertForTokenClassification)
    rows = [{"input_ids": ids, "labels": [i % 3 for i in ids]} for ids in TEXTS]
    loss, count = label_loss(model, Labelled(pad)(rows))
    wanted = sum(summed(model(torch.tensor([t])).logits[0], [i % 3 for i in t]) for t in TEXTS)
    assert count == sum(map(len, TEXTS)) and float(loss) == pytest.approx(wanted, rel=1e-5)


@PADS
@torch.no_grad()
def test_an_encoder_decoder_loses_together_what_it_loses_alone(pad: int) -> None:
    model = t5()
    rows = [{"input_ids": a, "labels": b} for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]
    loss, count = label_loss(model, Halves(pad, 0)(rows))
    wanted = 0.0
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        wanted += summed(model(input_ids=ids, labels=labels).logits[0], row["labels"])
    assert count == sum(map(len, TEXTS)) and float(loss) == pytest.approx(wanted, rel=1e-5)


@PADS
@torch.no_grad()
def test_answers_are_as_likely_together_as_alone(pad: int) -> None:
    model = llama()

    def row(ids: list[int], other: list[int]) -> dict[str, list[int]]:
        labels = [[IGNORED, *part[1:]] for part in (ids, other)]
        sides = {"input_ids": ids, "rejected_ids": other}
        return {**sides, "labels": labels[0], "rejected_labels": labels[1]}

    rows = [row(TEXTS[0], TEXTS[1]), row(TEXTS[2], TEXTS[0])]
    found = likelihoods(model, Pairs(pad)(rows), find(model))
    for said, ids in zip(found, (TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[0]), strict=True):
        alone = -summed(model(torch.tensor([ids])).logits[0, :-1], ids[1:])
        assert float(said) == pytest.approx(alone, rel=1e-5)


@PADS
def test_no_gap_is_asked_for_in_padding(pad: int) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in TEXTS]
    collate: Callable[..., Any] = Gaps(pad, 4, 40, share=0.9)
    batch = collate(rows)
    there = torch.tensor([[i < len(ids) for i in range(9)] for ids in TEXTS])
    assert (batch["labels"][~there] == IGNORED).all() and (batch["labels"] != IGNORED).any()
    assert (batch["input_ids"][~there] == pad).all()
    assert torch.equal(batch["attention_mask"].bool(), there)


@pytest.mark.parametrize(
    ("model", "tokenizer", "eos", "wanted"),
    [(7, 8, 9, 7), (None, 8, 9, 8), (None, None, 9, 9), (None, None, None, 0), (0, 8, 9, 0)],
)
def test_the_padding_token_is_the_models_else_the_tokenizers_else_its_end(
    model: int | None, tokenizer: int | None, eos: int | None, wanted: int
) -> None:
    text = SimpleNamespace(pad_token_id=model)
    config = SimpleNamespace(get_text_config=lambda: text)
    assert pad_of(config, SimpleNamespace(pad_token_id=tokenizer, eos_token_id=eos)) == wanted
