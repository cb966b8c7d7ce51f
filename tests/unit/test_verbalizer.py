"""From scores at masks to labels, against sums and loops in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmkit.prompting.labelwords import LabelWords, Word
from bmkit.verbalizers import calibration
from bmkit.verbalizers import manual as verbalizer
from bmkit.verbalizers.manual import Columns, Handler

VOCABULARY = 12
IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3)
LABELS = st.lists(st.lists(IDS, min_size=1, max_size=3), min_size=1, max_size=4)
HANDLERS: tuple[Handler, ...] = ("first", "mean", "max")


def made(ids: Sequence[Sequence[Sequence[int]]]) -> LabelWords:
    words = tuple(tuple(Word(str(own), tuple(own)) for own in label) for label in ids)
    return LabelWords(tuple(f"l{i}" for i in range(len(ids))), words)


def logits(rows: int, *shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *(shape or (VOCABULARY,)), generator=draw, dtype=torch.float64) * 3


def one_score(row: Sequence[float], ids: Sequence[int], handler: str) -> float:
    found = [row[i] for i in ids]
    return {"first": found[0], "mean": sum(found) / len(found), "max": max(found)}[handler]


def directly(
    row: Sequence[float],
    ids: Sequence[Sequence[Sequence[int]]],
    handler: str,
    prior: Sequence[Sequence[float]] | None = None,
) -> list[float]:
    """Return the probabilities of labels as OpenPrompt's manual verbalizer means them."""
    exps = [[math.exp(one_score(row, word, handler)) for word in label] for label in ids]
    total = sum(map(sum, exps))
    probs = [[e / total for e in label] for label in exps]
    if prior is not None:
        probs = [
            [p / q for p, q in zip(*both, strict=True)] for both in zip(probs, prior, strict=True)
        ]
        total = sum(map(sum, probs))
        probs = [[p / total for p in label] for label in probs]
    scores = [math.exp(sum(math.log(p) for p in label) / len(label)) for label in probs]
    return [s / sum(scores) for s in scores]


@given(LABELS, st.sampled_from(HANDLERS), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_labels_are_as_likely_as_a_direct_computation_says(
    ids: list[list[list[int]]], handler: Handler, seed: int
) -> None:
    scores = logits(3, seed=seed)
    columns = Columns.of(made(ids))
    found = verbalizer.label_logprobs(columns.pick(scores), columns, handler).exp()
    wanted = [directly(row, ids, handler) for row in scores.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    of_logprobs = verbalizer.label_logprobs(columns.pick(scores.log_softmax(-1)), columns, handler)
    torch.testing.assert_close(of_logprobs.exp(), found)


@given(LABELS, st.sampled_from(HANDLERS), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_calibrated_labels_are_as_likely_as_a_direct_computation_says(
    ids: list[list[list[int]]], handler: Handler, seed: int
) -> None:
    scores, empty = logits(3, seed=seed), logits(4, seed=seed + 100)
    columns = Columns.of(made(ids))
    words = verbalizer.normalise(
        verbalizer.word_scores(columns.pick(empty), columns, handler), columns.words
    )
    prior = calibration.prior(words)
    flat = [[math.exp(p) for p in own if p > -math.inf] for own in prior.tolist()]
    assert math.isclose(sum(map(sum, flat)), 1)
    direct = []
    for row in empty.tolist():
        exps = [[math.exp(one_score(row, w, handler)) for w in label] for label in ids]
        direct.append([[e / sum(map(sum, exps)) for e in label] for label in exps])
    for i, label in enumerate(ids):
        for j in range(len(label)):
            assert math.isclose(flat[i][j], sum(row[i][j] for row in direct) / 4, rel_tol=1e-9)
    found = verbalizer.label_logprobs(columns.pick(scores), columns, handler, prior=prior)
    wanted = [directly(row, ids, handler, flat) for row in scores.tolist()]
    torch.testing.assert_close(found.exp(), torch.tensor(wanted, dtype=torch.float64))


def test_only_the_columns_of_label_words_are_looked_at() -> None:
    words = made([[[3, 1], [7]], [[9]]])
    columns = Columns.of(words)
    assert columns.token_ids.tolist() == [1, 3, 7, 9] == list(words.token_ids)
    scores = logits(2)
    other = torch.full_like(scores, torch.nan)
    other[:, columns.token_ids] = scores[:, columns.token_ids]
    assert verbalizer.label_logprobs(columns.pick(other), columns).isfinite().all()


def test_a_template_that_says_everything_itself_is_calibrated_to_even_odds() -> None:
    words = verbalizer.normalise(logits(1, 3, 2), torch.ones(3, 2, dtype=torch.bool))
    even = calibration.apply(words, calibration.prior(words))
    torch.testing.assert_close(even, torch.full_like(even, math.log(1 / 6)))


def test_the_prior_of_logarithms_is_the_softmax_of_the_mean_logits() -> None:
    scores = logits(5, 4)
    found = calibration.prior(scores.log_softmax(-1), over="logarithms")
    torch.testing.assert_close(found, scores.mean(0).log_softmax(-1))


def test_the_mean_may_be_of_probabilities() -> None:
    columns = Columns.of(made([[[0], [1]], [[2]]]))
    logprobs = logits(2, 3).log_softmax(-1)
    words = verbalizer.normalise(verbalizer.word_scores(logprobs, columns), columns.words)
    found = verbalizer.aggregate(words, columns.words, "probabilities").exp()
    for row, probs in zip(found.tolist(), logprobs.exp().tolist(), strict=True):
        left, right = (probs[0] + probs[1]) / 2, probs[2]
        assert math.isclose(row[0], left / (left + right))


def test_weights_of_words_weigh_their_mean() -> None:
    columns = Columns.of(made([[[0], [1]], [[2]]]))
    words = verbalizer.normalise(verbalizer.word_scores(logits(2, 3), columns), columns.words)
    weights = torch.tensor([[math.log(3), 0.0], [5.0, 9.0]], dtype=torch.float64)
    found = verbalizer.aggregate(words, columns.words, weights=weights)
    wanted = torch.stack([words[:, 0, 0] * 0.75 + words[:, 0, 1] * 0.25, words[:, 1, 0]], 1)
    torch.testing.assert_close(found, wanted.log_softmax(-1))


def test_one_label_has_probability_one_and_equal_labels_share_it() -> None:
    columns = Columns.of(made([[[0], [1]]]))
    assert verbalizer.label_logprobs(logits(2, 2), columns).tolist() == [[0.0], [0.0]]
    columns = Columns.of(made([[[0]], [[1]]]))
    even = verbalizer.label_logprobs(torch.zeros(1, 2), columns).exp()
    assert even.tolist() == [[0.5, 0.5]]


def test_words_of_no_probability_leave_numbers_that_make_sense() -> None:
    columns = Columns.of(made([[[0], [1]], [[2]]]))
    scores = torch.tensor([[-torch.inf, 1.0, 0.0], [-torch.inf] * 3, [-torch.inf, -torch.inf, 0.0]])
    scores.requires_grad_()
    found = verbalizer.label_logprobs(scores, columns)
    assert found.isfinite().all()
    assert found[1].exp().tolist() == pytest.approx([0.5, 0.5])
    assert found[2, 1] > -1e-6
    found[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_a_score_that_is_no_number_is_not_hidden() -> None:
    columns = Columns.of(made([[[0]], [[1]]]))
    found = verbalizer.label_logprobs(torch.tensor([[torch.nan, 1.0]]), columns)
    assert found.isnan().all()


def test_scores_of_half_precision_are_counted_in_float32() -> None:
    columns = Columns.of(made([[[0, 1, 2]], [[3]]]))
    scores = logits(4).to(torch.bfloat16)
    found = verbalizer.label_logprobs(columns.pick(scores), columns, "mean")
    wanted = [directly(row, [[[0, 1, 2]], [[3]]], "mean") for row in scores.tolist()]
    torch.testing.assert_close(found.exp(), torch.tensor(wanted))


def test_likelihoods_of_words_are_sums_or_means_over_their_own_tokens() -> None:
    logprobs = logits(2, 3, 4)
    lengths = torch.tensor([1, 4, 2])
    logprobs[:, 0, 1:] = torch.nan  # what stands behind a word isn't looked at
    for how in ("sum", "mean"):
        found = verbalizer.combine(logprobs, lengths, how)  # type: ignore[arg-type]
        for i in range(2):
            for j, length in enumerate(lengths.tolist()):
                own = sum(logprobs[i, j, t].item() for t in range(length))
                wanted = own / length if how == "mean" else own
                assert math.isclose(found[i, j].item(), wanted, rel_tol=1e-12)


def test_likelihoods_are_arranged_by_label_and_then_count_like_any_scores() -> None:
    columns = Columns.of(made([[[0]], [[1, 2], [3]]]))
    likely = torch.tensor([[-1.0, -2.0, -3.0]])
    arranged = columns.arrange(likely)
    assert arranged.tolist() == [[[-1.0, -torch.inf], [-2.0, -3.0]]]
    found = verbalizer.aggregate(verbalizer.normalise(arranged, columns.words), columns.words)
    assert math.isclose(found[0, 0].exp().item(), 1 / (1 + math.exp(-1.5)), rel_tol=1e-6)


def test_labels_of_several_masks_are_as_likely_as_their_words_together() -> None:
    ids = [[[0], [3, 4]], [[1], [3, 4]], [[0], [5]]]
    columns = Columns.of(made(ids))
    scores = logits(2, 2, VOCABULARY)
    found = verbalizer.rule_logprobs(columns.pick(scores), columns, "mean").exp()
    for row, masks in zip(found.tolist(), scores.tolist(), strict=True):
        logprob = [[s - math.log(sum(map(math.exp, one))) for s in one] for one in masks]
        joint = [
            math.exp(sum(one_score(logprob[m], word, "mean") for m, word in enumerate(label)))
            for label in ids
        ]
        assert row == pytest.approx([j / sum(joint) for j in joint])


def test_several_labels_are_those_whose_words_a_row_makes_likelier() -> None:
    columns = Columns.of(made([[[0], [1]], [[2]], [[3]]]))
    prior = torch.tensor([0.1, 0.1, 0.4, 0.4]).log()
    row = torch.tensor([[0.3, 0.2, 0.1, 0.4]]).log()
    words = calibration.relative(
        verbalizer.word_scores(row, columns), verbalizer.word_scores(prior[None], columns)[0]
    )
    scores = verbalizer.label_scores(words, columns.words)
    assert scores[0].tolist() == pytest.approx([math.log(6) / 2, math.log(0.25), 0.0], abs=1e-6)
    assert verbalizer.chosen(scores, 0.4).tolist() == [[True, False, True]]
    assert verbalizer.chosen(scores, 0.6).tolist() == [[True, False, False]]


def test_probabilities_have_names() -> None:
    found = verbalizer.probabilities(torch.tensor([[0.25, 0.75]]).log(), ["no", "yes"])
    assert found == [{"no": pytest.approx(0.25), "yes": pytest.approx(0.75)}]
