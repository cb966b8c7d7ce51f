"""What a model knows: the place of the right answer, and the likeliest ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bmkit.prompt.ask import Asker
from bmkit.prompt.probing import Probe
from bmkit.prompting.encode import Encoded
from bmkit.prompting.labelwords import Word
from bmkit.verbalizers import ranks

Build = Callable[..., Any]
NOTHING: dict[str, Any] = {"roles": [], "piece": [], "soft": []}
CANDIDATES = ((5,), (6, 7), (6, 8, 9))


def prompts(kind: str) -> list[Encoded]:
    """Prompts of different lengths; the longest isn't first."""
    rows = [[3, 4], [11, 12, 13, 14], [3, 15, 16]]
    if kind == "causal":
        return [Encoded(row, masks=[len(row)], reads=[len(row) - 1], **NOTHING) for row in rows]
    made = [[*row, 39, 2] for row in rows]
    places = [len(row) for row in rows]
    if kind == "masked":
        return [
            Encoded(r, masks=[at], reads=[at], **NOTHING)
            for r, at in zip(made, places, strict=True)
        ]
    decoder = [1, 39]
    return [
        Encoded(r, masks=[at], reads=[1], decoder_ids=decoder, **NOTHING)
        for r, at in zip(made, places, strict=True)
    ]


def directly(model: Any, prompt: Encoded, kind: str, word: tuple[int, ...] = ()) -> Any:
    """Return log-probabilities at the mask, or of a word in its place token by token."""
    total, said = 0.0, list[int]()
    for token in word or (0,):
        ids = torch.tensor([[*prompt.ids, *said] if kind == "causal" else prompt.ids])
        more = {}
        if kind == "seq2seq":
            more = {"decoder_input_ids": torch.tensor([[*prompt.decoder_ids, *said]])}
        with torch.no_grad():
            logits = model(input_ids=ids, **more).logits[0]
        at = prompt.reads[0] + len(said)
        found = logits[at].log_softmax(-1)
        if not word:
            return found
        total += float(found[token])
        said.append(token)
    return total


FAMILIES = [("bert", "masked"), ("llama", "causal"), ("gpt2", "causal"), ("t5", "seq2seq")]


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_all_tokens_are_told_and_the_right_one_has_its_place(
    architecture: Build, family: str, kind: Any
) -> None:
    model = architecture(family, real=True, initializer_range=0.5)
    asked = prompts(kind)
    asker = Asker(model, kind, 39, 8)  # a batch has one row, or two
    said = Probe().ask(asker, asked)
    wanted = torch.stack([directly(model, prompt, kind) for prompt in asked])
    torch.testing.assert_close(said, wanted, atol=1e-5, rtol=1e-4)
    right = [7, 20, 33]

    def take(part: Any, rows: list[int]) -> Any:
        return ranks.ranks(part, torch.tensor([right[row] for row in rows]))[:, None]

    found = Probe().ask(asker, asked, take=take)[:, 0].tolist()
    order = [row.argsort(descending=True).tolist() for row in wanted]
    assert found == [1 + own.index(one) for own, one in zip(order, right, strict=True)]


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize(("family", "kind"), FAMILIES[1:])
def test_candidates_are_as_likely_as_token_by_token(
    architecture: Build, family: str, kind: Any, combine: Any
) -> None:
    model = architecture(family, real=True, initializer_range=0.5)
    probe = Probe(tuple(Word("", ids) for ids in CANDIDATES), combine)
    said = probe.ask(Asker(model, kind, 39, 64), prompts(kind))
    for row, prompt in zip(said, prompts(kind), strict=True):
        found = [directly(model, prompt, kind, word) for word in CANDIDATES]
        if combine == "mean":
            found = [one / len(word) for one, word in zip(found, CANDIDATES, strict=True)]
        torch.testing.assert_close(row, torch.tensor(found).log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_of_equals_the_first_goes_first() -> None:
    said = torch.tensor([[-1.0, -2.0, -1.0, -3.0]] * 4)
    assert ranks.ranks(said, torch.arange(4)).tolist() == [1, 3, 2, 4]


def test_figures_are_those_of_places() -> None:
    assert ranks.measure([1, 2, 10, 11]) == {
        "precision_at_1": 0.25,
        "precision_at_10": 0.75,
        "mean_reciprocal_rank": round((1 + 1 / 2 + 1 / 10 + 1 / 11) / 4, 6),
    }
