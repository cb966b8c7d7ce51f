"""How much words count for their label, learned: against the formula of KPT's paper."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bmkit.errors import InputError
from bmkit.prompt.labels import FILE, Verbalizer
from bmkit.prompting.labelwords import LabelWords, Word
from bmkit.verbalizers import wordweights

WORDS = LabelWords(
    ("a", "b"), tuple(tuple(Word(str(t), (t,)) for t in own) for own in ((3, 5, 9), (4, 7)))
)
SAID = torch.tensor([[-1.0, -2.5, -0.5, -3.0, -2.0], [-2.0, -0.1, -4.0, -1.0, -3.0]])
"""Of the tokens 3, 4, 5, 7, 9."""


def by_hand(row: list[float], logits: list[list[float]]) -> list[float]:
    total = sum(map(math.exp, row))
    own = [[row[0], row[2], row[4]], [row[1], row[3]]]
    scores = []
    for words, weights in zip(own, logits, strict=True):
        whole = sum(map(math.exp, weights))
        shares = [math.exp(one) / whole for one in weights]
        logs = [math.log(math.exp(word) / total) for word in words]
        scores.append(sum(s * one for s, one in zip(shares, logs, strict=True)))
    return [math.exp(s) / sum(map(math.exp, scores)) for s in scores]


def test_a_label_has_the_weighted_mean_of_its_words() -> None:
    told = Verbalizer(WORDS).weighted()
    assert told.module is not None
    plain = Verbalizer(WORDS).label_logprobs(SAID)
    torch.testing.assert_close(told.label_logprobs(SAID), plain)
    with torch.no_grad():
        told.module.logits.copy_(torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 9.0]]))
    for row, said in zip(told.label_logprobs(SAID).exp().tolist(), SAID.tolist(), strict=True):
        assert row == pytest.approx(by_hand(said, [[0.5, -1.0, 2.0], [1.0, 0.0]]), abs=1e-6)
    shares = told.module.shares(told.columns.words)
    assert shares.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert float(shares[1, 2]) == 0.0


def test_a_word_that_tells_rows_wrongly_comes_to_count_less() -> None:
    told = Verbalizer(WORDS).weighted()
    assert told.module is not None
    right = torch.tensor([0, 1])
    optimizer = torch.optim.SGD(told.module.parameters(), lr=1.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = told.loss(SAID, right)
        losses.append(float(loss.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    shares = told.module.shares(told.columns.words)
    assert shares[0, 1] == shares[0].max(), "token 5 is likely in the row of `a` alone"


def test_weights_come_back_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    told = Verbalizer(WORDS).weighted()
    assert told.module is not None
    with torch.no_grad():
        told.module.logits.normal_()
    told.save(tmp_path)
    assert torch.equal(wordweights.load(tmp_path / FILE).logits, told.module.logits)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(InputError, match="is damaged"):
        wordweights.load(tmp_path / FILE)
