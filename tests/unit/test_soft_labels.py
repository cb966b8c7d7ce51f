"""Rows that say how likely labels are: read, put into batches, and what the loss is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bmkit.data import labelled
from bmkit.data.batch import Labelled
from bmkit.errors import InputError
from bmkit.train.heads import label_figures, label_loss

SHARES = [[0.7, 0.2, 0.1], [0.0, 0.25, 0.75]]
LOGITS = [[0.3, -1.0, 2.0], [1.0, 0.5, -0.5]]


def says(logits: list[list[float]]) -> Callable[..., Any]:
    """A model that says these logits, whatever it reads."""
    return lambda **_: SimpleNamespace(logits=torch.tensor(logits))


def batch() -> dict[str, Tensor]:
    shares = torch.tensor(SHARES)
    return {"input_ids": torch.ones(2, 1), "labels": shares.argmax(-1), "probabilities": shares}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_the_cross_entropy_of_both_made_flatter(temperature: float) -> None:
    wanted = 0.0
    for logits, shares in zip(LOGITS, SHARES, strict=True):
        flat = [share ** (1 / temperature) for share in shares]
        raised = [math.exp(logit / temperature) for logit in logits]
        for want, said in zip(flat, raised, strict=True):
            wanted -= temperature**2 * want / sum(flat) * math.log(said / sum(raised))
    found, count = label_loss(says(LOGITS), batch(), temperature)
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert count == 2


def test_certain_probabilities_are_as_labels() -> None:
    sure = {**batch(), "probabilities": torch.eye(3)[torch.tensor([0, 2])]}
    plain = {name: value for name, value in sure.items() if name != "probabilities"}
    one, two = (label_loss(says(LOGITS), each)[0] for each in (sure, plain))
    assert float(one) == pytest.approx(float(two), rel=1e-6)


def test_the_likeliest_label_is_the_right_one_on_held_out_rows() -> None:
    found = label_figures(says(LOGITS), [batch()], torch.device("cpu"), 3)
    assert found["dev_accuracy"] == 0.0
    swapped = label_figures(says(SHARES), [batch()], torch.device("cpu"), 3)
    assert swapped["dev_accuracy"] == 1.0
    assert found["dev_loss"] == pytest.approx(float(label_loss(says(LOGITS), batch())[0]) / 2)


def words(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [len(word) for word in text.split()]}


def test_rows_with_labels_and_rows_with_probabilities_go_together(
    rows: Callable[..., Path],
) -> None:
    path = rows(
        "x.jsonl",
        {"text": "a bc", "probabilities": {"yes": 0.333333, "no": 0.666666}},
        {"text": "a", "label": "yes"},
        {"text": "b", "label": "yes", "probabilities": {"no": 1}},
    )
    labels = labelled.labels_of(path)
    assert labels == ["no", "yes"]
    found = labelled.encode_texts(path, words, labels, max_length=8)
    made = Labelled(0)(found.examples)
    assert made["probabilities"].sum(-1).tolist() == pytest.approx([1, 1, 1])
    assert made["probabilities"][:, 1].tolist() == pytest.approx([1 / 3, 1, 0], abs=1e-5)
    assert made["labels"].tolist() == [0, 1, 0]
    assert made["input_ids"].tolist() == [[1, 2], [1, 0], [1, 0]]


def test_a_row_without_either_is_refused_by_its_line(rows: Callable[..., Path]) -> None:
    path = rows("x.jsonl", {"text": "a", "probabilities": {"no": 0.5, "yes": 0.5}}, {"text": "b"})
    with pytest.raises(InputError, match=r"x\.jsonl:2: it has no"):
        labelled.labels_of(path)
