"""Words at several masks: PTR's labels, and texts that a model says mask by mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bmkit.errors import InputError
from bmkit.prompt.ask import Asker
from bmkit.prompt.rules import Rules
from bmkit.prompting.encode import Encoded, Kind
from bmkit.prompting.labelwords import LabelWords, Word
from bmkit.verbalizers import filled
from bmkit.verbalizers.rules import SubLabels

Build = Callable[..., Any]
MASK, SENTINELS = 39, (38, 37)
IDS = {"parent": [[[5], [6, 7]], [[5], [8]], [[9, 10], [8]]]}["parent"]
"""By label and mask: tokens. Two labels share each word."""


def words(ids: list[list[list[int]]]) -> LabelWords:
    made = tuple(tuple(Word(str(word), tuple(word)) for word in own) for own in ids)
    return LabelWords(tuple(f"l{n}" for n in range(len(ids))), made)


def encoded(before: list[int], between: list[int], behind: list[int], kind: str) -> Encoded:
    """A prompt with two masks, as the encoder makes it."""
    nothing: dict[str, Any] = {"roles": [], "piece": [], "soft": []}
    masks = [len(before), len(before) + 1 + len(between)]
    if kind == "causal":
        rest = [*between, *behind]
        masks[1] -= 1
        return Encoded(before, masks=masks, reads=[len(before) - 1], behind=rest, **nothing)
    said = SENTINELS if kind == "t5" else (MASK, MASK)
    ids = [*before, said[0], *between, said[1], *behind]
    if kind == "masked":
        return Encoded(ids, masks=masks, reads=masks, **nothing)
    decoder = [1, *SENTINELS] if kind == "t5" else [1, *ids[: masks[-1]]]
    reads = [1, 2] if kind == "t5" else masks
    return Encoded(ids, masks=masks, reads=reads, decoder_ids=decoder, **nothing)


ROWS = [([3, 4], [11], [12, 13]), ([14, 3, 4, 15], [], [12]), ([16], [17, 18, 19], [])]


def logprobs(model: Any, ids: list[int], said: list[int] | None = None) -> Any:
    more = {} if said is None else {"decoder_input_ids": torch.tensor([said])}
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **more).logits[0].log_softmax(-1)


def brute_force(model: Any, prompt: Encoded, kind: str, label: list[list[int]]) -> float:
    """The log-likelihood of the words, and of what is said between them, token by token."""
    full = [*prompt.ids, *prompt.behind]
    first, second = prompt.masks
    if kind == "causal":
        said = [*label[0], *full[first:second], *label[1], *full[second:]]
        start, read = full[:first], None
    elif kind == "t5":
        said, start, read = [*label[0], SENTINELS[1], *label[1]], [1, SENTINELS[0]], prompt.ids
    else:
        said = [*label[0], *full[first + 1 : second], *label[1]]
        start, read = [1, *full[:first]], prompt.ids
    total = 0.0
    for at, token in enumerate(said):
        ids = [*start, *said[:at]]
        found = logprobs(model, ids) if read is None else logprobs(model, read, ids)
        total += float(found[-1, token])
    return total


@pytest.mark.parametrize("by", ["sum", "mean"])
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "causal"), ("gpt2", "causal"), ("t5", "t5"), ("bart", "bart")]
)
def test_words_at_several_masks_are_as_likely_as_said_token_by_token(
    architecture: Build, family: str, kind: str, by: Any
) -> None:
    model = architecture(family, real=True, initializer_range=0.5)
    prompts = [encoded(*row, kind) for row in ROWS]
    asked: Kind = "causal" if kind == "causal" else "seq2seq"
    choices = [IDS, IDS, [IDS[2], IDS[0], IDS[1]]]
    with torch.no_grad():
        found = filled.score(model, prompts, asked, choices, by=by, batch_tokens=40)
    for row, prompt, own in zip(found.tolist(), prompts, choices, strict=True):
        wanted = [brute_force(model, prompt, kind, label) for label in own]
        if by == "mean":
            sizes = [len(filled.text(prompt, asked, label)) for label in own]
            wanted = [total / size for total, size in zip(wanted, sizes, strict=True)]
        assert row == pytest.approx(wanted, abs=1e-4)
    assert len({round(one, 3) for one in found[0].tolist()}) == 3


@pytest.mark.parametrize("handler", ["first", "mean", "max"])
def test_a_masked_model_reads_all_masks_at_once(architecture: Build, handler: Any) -> None:
    model = architecture("bert", real=True, initializer_range=0.5)
    prompts = [encoded(*row, "masked") for row in ROWS]
    rules = Rules(words(IDS), handler)
    asker = Asker(model, "masked", MASK, 64)
    found = rules.label_logprobs(rules.ask(asker, prompts)).exp().tolist()
    take = {"first": lambda s: s[0], "mean": lambda s: sum(s) / len(s), "max": max}[handler]
    for row, prompt in zip(found, prompts, strict=True):
        said = logprobs(model, prompt.ids)
        joint = [
            math.exp(
                sum(
                    take([float(said[at, token]) for token in word])
                    for at, word in zip(prompt.masks, label, strict=True)
                )
            )
            for label in IDS
        ]
        assert row == pytest.approx([one / sum(joint) for one in joint], abs=1e-5)


def test_calibration_divides_labels_by_what_they_are_anyway(architecture: Build) -> None:
    model = architecture("bert", real=True, initializer_range=0.5)
    prompts = [encoded(*row, "masked") for row in ROWS]
    asker = Asker(model, "masked", MASK, 64)
    rules = Rules(words(IDS))
    said = rules.ask(asker, prompts)
    plain = rules.label_logprobs(said).exp()
    prior = plain[:2].mean(0)
    wanted = plain / prior
    calibrated = rules.calibrated(said[:2])
    torch.testing.assert_close(
        calibrated.label_logprobs(said).exp(), wanted / wanted.sum(1, keepdim=True)
    )
    kept = calibrated.kept_prior()
    assert kept is not None
    again = rules.with_prior(kept)
    assert torch.equal(again.label_logprobs(said), calibrated.label_logprobs(said))


def test_the_loss_is_that_of_labels_and_the_mean_of_sub_labels() -> None:
    sub = SubLabels.of(words(IDS))
    assert sub.numbers.tolist() == [[0, 0, 1], [0, 1, 1]]
    scores = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))  # by column
    rules = Rules(words([[[0], [2]], [[0], [3]], [[1], [3]]]))
    right = torch.tensor([2, 0])
    found = float(rules.loss(scores.flatten(1), right))

    def entropy(values: list[float], own: int) -> float:
        return math.log(sum(map(math.exp, values))) - values[own]

    total = 0.0
    for row, own in zip(scores.tolist(), right.tolist(), strict=True):
        first, second = row[0], row[1]
        labels = [first[0] + second[2], first[0] + second[3], first[1] + second[3]]
        total += entropy(labels, own)
        total += entropy(first[:2], [0, 0, 1][own]) / 2
        total += entropy(second[2:], [0, 1, 1][own]) / 2
    assert found == pytest.approx(total, rel=1e-5)


def test_what_is_longer_than_the_context_names_the_row(architecture: Build) -> None:
    model = architecture("gpt2", real=True)
    long = encoded([3] * 20, [11] * 10, [12] * 10, "causal")
    with pytest.raises(InputError, match="row 2: "):
        filled.score(model, [encoded(*ROWS[0], "causal"), long], "causal", [IDS, IDS])
