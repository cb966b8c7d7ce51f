"""Templates that a model writes: forms with gaps, and the beam search over all rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bmkit.data.tabular import Record
from bmkit.errors import InputError, RecipeError
from bmkit.prompt import beams, written
from bmkit.prompt.beams import Beam
from bmkit.prompt.written import Writer
from bmkit.prompting import forms, template
from bmkit.prompting.encode import Encoder, Kind
from bmkit.prompting.forms import Said
from bmkit.prompting.labelwords import LabelWords, Word
from bmkit.prompting.template import to_text
from bmkit.prompting.wrap import show, wrap

GAP = '{"special": "<extra_id_%d>"}'
SIZE, END = 7, 6
SENTINELS = (3, 4, 5)
NONE = torch.zeros(SIZE, dtype=torch.bool)


def step(said: Sequence[int]) -> Tensor:
    """Log-probabilities of seven tokens, which all that was said decides."""
    generator = torch.Generator().manual_seed(hash(tuple(said)) % 2**31)
    return torch.randn(SIZE, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def score(tokens: Sequence[int]) -> float:
    return sum(float(step(tokens[:at])[tokens[at]]) for at in range(1, len(tokens)))


def whole(most: int) -> list[tuple[int, ...]]:
    """All texts of two gaps within `most` new tokens, by brute force."""
    found = []
    for count in range(2, most + 1):
        for tail in itertools.product(range(SIZE), repeat=count):
            *inner, last = tail
            if inner.count(4) == 1 and last in (5, END) and not {3, 5, END} & set(inner):
                found.append((3, *tail))
    return sorted(found, key=lambda tokens: (-score(tokens), tokens))


def test_a_beam_that_is_wide_enough_finds_what_brute_force_finds() -> None:
    wanted = whole(4)
    assert len(wanted) == 2 * (1 + 2 * 3 + 3 * 9)
    found = beams.search(
        step,
        sentinels=SENTINELS,
        end=END,
        width=10**4,
        max_new_tokens=4,
        banned=NONE,
        once=NONE,
    )
    assert [beam.tokens for beam in found] == wanted
    assert [beam.score for beam in found] == pytest.approx([score(t) for t in wanted])
    assert all(beam.done for beam in found)


def test_a_narrow_beam_keeps_the_likeliest_at_each_token_whole_ones_among_them() -> None:
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, (3,))]
    ends = {tokens for tokens in whole(4)}
    for _ in range(4):
        pool = [one for one in live if one[1] in ends]
        for total, tokens in live:
            if tokens not in ends:
                first = 4 not in tokens
                allowed = [0, 1, 2, 4] if first else [0, 1, 2, 5, END]
                pool += [(total + float(step(tokens)[t]), (*tokens, t)) for t in allowed]
        live = sorted(pool, key=lambda one: (-one[0], one[1]))[:3]
    found = beams.search(
        step, sentinels=SENTINELS, end=END, width=3, max_new_tokens=4, banned=NONE, once=NONE
    )
    assert [beam.tokens for beam in found] == [tokens for _, tokens in live if tokens in ends]


def test_banned_tokens_are_never_said_and_others_not_twice_in_a_row() -> None:
    banned, once = NONE.clone(), NONE.clone()
    banned[0], once[1] = True, True
    found = beams.search(
        step, sentinels=SENTINELS, end=END, width=999, max_new_tokens=5, banned=banned, once=once
    )
    texts = [beam.tokens for beam in found]
    assert texts
    assert not any(0 in text for text in texts)
    assert not any((1, 1) in itertools.pairwise(text) for text in texts)
    assert any((2, 2) in itertools.pairwise(text) for text in texts)


def test_the_tokens_of_gaps_are_told_apart() -> None:
    assert beams.parts(Beam((3, 0, 1, 4, 2, 5), 0.0), SENTINELS) == [[0, 1], [2]]
    assert beams.parts(Beam((3, 4, END), 0.0), SENTINELS) == [[], []]


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        (
            "masked",
            '{"placeholder": "a"} was {"mask"}',
            ["a <0> <mask> <1>", "<0> <mask> <1> a"],
        ),
        ("causal", '{"placeholder": "a"} was {"mask"}', ["a <0> <mask>"]),
        ("seq2seq", '{"placeholder": "a"}? {"mask"}, {"placeholder": "b"}', ["a <0> <mask> <1> b"]),
        ("causal", '{"placeholder": "a"}? {"mask"}, {"placeholder": "b"}', ["a b <0> <mask>"]),
    ],
)
def test_the_usual_forms_are_those_of_the_paper_and_causal_models_read_all(
    kind: Kind, text: str, wanted: list[str]
) -> None:
    found = forms.usual(template.parse(text), kind)
    shown = [show(wrap(form.template, {"a": "a", "b": "b"}, 1)) for form in found]
    assert [one.replace("extra_id_", "") for one in shown] == wanted


def test_a_filled_form_is_a_template_that_reads_back_equal() -> None:
    form = forms.parse(f'{{"placeholder": "a"}} {GAP % 0} {{"mask"}} {GAP % 1}')
    filled = form.filled([Said("It was {so}"), Said(" .", space=False)])
    text = to_text(filled)
    assert text == '{"placeholder": "a"} It was {{so}} {"mask"}.'
    assert template.parse(text) == filled
    assert show(wrap(form.with_word("great"), {"a": "Fine."}, 1)) == (
        "Fine. <extra_id_0> great <extra_id_1>"
    )
    empty = forms.parse(f'{GAP % 0} {{"mask"}}').filled([Said("")])
    assert to_text(empty) == '{"mask"}'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"placeholder": "a"} {"mask"}', "its gaps are none"),
        (f'{GAP % 1} {{"mask"}}', "count from 0"),
        (f"{GAP % 0} a", "no {"),
        (f'{GAP % 0} {{"mask"}} {{"mask"}}', "2 masks"),
    ],
)
def test_a_form_without_a_mask_or_gaps_in_order_is_refused(text: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        forms.parse(text)


def test_a_template_without_texts_of_rows_has_no_usual_form() -> None:
    with pytest.raises(RecipeError, match="no placeholder"):
        forms.usual(template.parse('It is {"mask"}'), "masked")


@pytest.fixture
def t5(tokenizer: Any, architecture: Callable[..., Any]) -> tuple[Any, Any]:
    """A small T5 that knows three sentinels, and its tokenizer."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<extra_id_{n}>" for n in range(3)]}
    )
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    model = architecture("t5", real=True, vocab_size=len(tokenizer) + 5, **ids)
    sentinels = [tokenizer.convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(3)]
    labels = torch.tensor([[sentinels[0], 70, 71, sentinels[1], 72, sentinels[2]]])
    inputs = torch.tensor([[70, 80, 90, *sentinels[:2]]])
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):  # so that it writes something whole
        steps.zero_grad()
        model(input_ids=inputs, labels=labels).loss.backward()
        steps.step()
    return model, tokenizer


def writer(t5: tuple[Any, Any], gaps: int = 2) -> Writer:
    model, known = t5
    encoder = Encoder(known, "seq2seq", 64, decoder_start=0)
    return Writer(model, known, encoder, gaps, Path("t5"))


WORDS = LabelWords(("no", "yes"), ((Word(" not", (1,)),), (Word(" Paris", (2,)),)))
ROWS = [Record(f"row {n}", n, {"a": text}) for n, text in enumerate(["It is 4.", "So", "What is"])]


def test_a_score_is_the_sum_over_rows_of_what_plain_transformers_says_of_the_text(
    t5: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, known = t5
    monkeypatch.setattr(written, "BATCH_TOKENS", 16)  # several batches
    ours = writer(t5)
    form = forms.usual(template.parse('{"placeholder": "a"} {"mask"}'), "masked")[0]
    held = ours.read(form, ROWS, [0, 1, 1], WORDS)
    assert len(held) > 1
    heard: list[int] = []
    found = list(ours.write(form, held, 5, 6, lambda: heard.append(1)))
    assert found
    assert 0 < len(heard) <= 6
    beams_found = beams.search(
        lambda said: ours.step(held, said),
        sentinels=ours.sentinels,
        end=2,
        width=5,
        max_new_tokens=6,
        banned=ours.banned,
        once=ours.once,
    )
    for beam, (said, told) in zip(beams_found, found, strict=True):
        total = 0.0
        for record, word in zip(ROWS, ("not", "Paris", "Paris"), strict=True):
            text = f"{record.values['a']}<extra_id_0> {word}<extra_id_1>"
            ids = known(text, return_tensors="pt", add_special_tokens=False).input_ids
            labels = torch.tensor([beam.tokens])
            with torch.no_grad():
                logits = model(input_ids=ids, labels=labels).logits[0].log_softmax(-1)
            total += sum(float(logits[at, beam.tokens[at]]) for at in range(1, len(beam.tokens)))
        assert told == beam.score == pytest.approx(total, rel=1e-4)
        assert len(said) == 2


def test_what_cannot_be_seen_is_never_written(t5: tuple[Any, Any]) -> None:
    ours = writer(t5)
    known = t5[1].get_vocab()
    assert ours.banned[[known[token] for token in ("Ġ", "Ċ", "<|im_start|>", "<extra_id_2>")]].all()
    assert ours.banned[len(known) :].all()
    assert not ours.banned[[known["a"], known["."], known["Ġis"]]].any()
    assert ours.once[known["."]]
    assert not ours.once[known["a"]]


def test_a_tokenizer_without_enough_sentinels_is_refused(t5: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="has no <extra_id_3>"):
        writer(t5, gaps=3)
