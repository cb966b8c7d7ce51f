"""Drawing tokens: the right distribution, and the same draws in every batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from bmkit.runtime import sampling
from bmkit.runtime.sampling import RepetitionPenalty

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -2.5]
NO_IDS = torch.zeros(1, 1, dtype=torch.long)

# The value that a chi-square variable exceeds once in a million times, by degrees of freedom.
CHI_SQUARE_1E_6 = {1: 23.93, 2: 27.63, 3: 30.66, 4: 33.38, 5: 35.89}


def ids(place: int) -> Tensor:
    """Return token ids of an answer that has got so far."""
    return NO_IDS.expand(1, place)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    """Return the probabilities that logits stand for."""
    powers = [math.exp(x / temperature) for x in logits]
    return [p / sum(powers) for p in powers]


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    """Return Pearson's statistic of observed counts."""
    n = sum(counts)
    return sum((c - n * p) ** 2 / (n * p) for c, p in zip(counts, probabilities, strict=True) if p)


def count_draws(steps: LogitsProcessorList, rows: int, times: int) -> list[int]:
    """Draw `times` tokens in each of `rows`, and count them."""
    scores = torch.tensor([LOGITS]).repeat(rows, 1)
    drawn = torch.stack([steps(ids(t), scores.clone()).argmax(-1) for t in range(times)])
    return torch.bincount(drawn.flatten(), minlength=len(LOGITS)).tolist()


def plain(seeds: list[int], **more: float) -> LogitsProcessorList:
    """Return processors that change nothing but what is asked for."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **more}
    return sampling.processors(seeds, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_of_one_row_follow_the_softmax(temperature: float) -> None:
    counts = count_draws(plain([7], temperature=temperature), rows=1, times=20_000)
    found = chi_square(counts, softmax(LOGITS, temperature))
    assert found < CHI_SQUARE_1E_6[len(LOGITS) - 1]


def test_first_draws_of_many_rows_follow_the_softmax() -> None:
    seeds = [sampling.row_seed(3, row) for row in range(20_000)]
    counts = count_draws(plain(seeds), rows=len(seeds), times=1)
    assert chi_square(counts, softmax(LOGITS)) < CHI_SQUARE_1E_6[len(LOGITS) - 1]


def test_draws_of_neighbouring_rows_and_times_are_independent() -> None:
    rows, times, half = 2, 20_000, torch.tensor([[0.0, 0.0]])
    steps = plain([sampling.row_seed(0, row) for row in range(rows)])
    scores = half.repeat(rows, 1)
    drawn = torch.stack([steps(ids(t), scores.clone()).argmax(-1) for t in range(times)])
    neighbours = drawn[:, 0] * 2 + drawn[:, 1]
    successors = drawn[:-1, 0] * 2 + drawn[1:, 0]
    for pairs in (neighbours, successors):
        counts = torch.bincount(pairs, minlength=4).tolist()
        assert chi_square(counts, [0.25] * 4) < CHI_SQUARE_1E_6[3]


def test_a_rows_draws_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 50, generator=generator)
    seeds = [sampling.row_seed(5, row) for row in range(4)]

    def draws(rows: list[int]) -> Tensor:
        steps = plain([seeds[r] for r in rows], temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)
        return torch.stack([steps(ids(t), scores[rows].clone()).argmax(-1) for t in range(50)])

    together = draws([0, 1, 2, 3])
    assert torch.equal(draws([3, 1])[:, 0], together[:, 3])
    for row in range(4):
        assert torch.equal(draws([row])[:, 0], together[:, row])
    assert not torch.equal(together[:, 0], together[:, 1])


def test_equal_seeds_draw_equally_and_others_do_not() -> None:
    def draws(seed: int) -> list[int]:
        steps = plain([sampling.row_seed(seed, 0)])
        return [int(steps(ids(t), torch.zeros(1, 50)).argmax()) for t in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_seeds_of_rows_differ_and_fit_a_generator() -> None:
    seeds = {
        sampling.row_seed(seed, row) for seed in (0, 1, 2, 2**32 - 1, 2**63) for row in range(2000)
    }
    assert len(seeds) == 5 * 2000
    assert all(0 <= seed < 2**63 for seed in seeds)


def support(**options: float) -> set[int]:
    """Return the tokens that can be drawn from LOGITS: those left before the draw."""
    steps = LogitsProcessorList(plain([0], **options)[:-1])
    scores = steps(NO_IDS, torch.tensor([LOGITS]))
    return set(scores.isfinite().nonzero()[:, 1].tolist())


@pytest.mark.parametrize("top_k", [1, 2, 5, 6, 100])
def test_top_k_leaves_the_k_likeliest(top_k: int) -> None:
    assert support(top_k=top_k) == set(range(min(top_k, len(LOGITS))))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.6, 0.8, 0.9, 0.95, 0.99])
def test_top_p_leaves_the_fewest_that_make_up_the_share(top_p: float, temperature: float) -> None:
    probabilities = softmax(LOGITS, temperature)  # falling, as LOGITS is
    size = next(n for n in range(1, 7) if sum(probabilities[:n]) >= top_p)
    assert support(top_p=top_p, temperature=temperature) == set(range(size))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("min_p", [0.01, 0.05, 0.1, 0.2, 0.4, 0.9])
def test_min_p_leaves_what_is_likely_enough_beside_the_top(
    min_p: float, temperature: float
) -> None:
    probabilities = softmax(LOGITS, temperature)
    wanted = {i for i, p in enumerate(probabilities) if p >= min_p * max(probabilities)}
    assert support(min_p=min_p, temperature=temperature) == wanted


def test_restrictions_apply_one_after_the_other_and_keep_the_proportions() -> None:
    steps = plain([11], temperature=0.7, top_k=4, top_p=0.95, min_p=0.05)
    kept = softmax([*LOGITS[:4], -math.inf, -math.inf], 0.7)
    size = next(n for n in range(1, 5) if sum(kept[:n]) >= 0.95)
    kept = [p if i < size and p >= 0.05 * kept[0] else 0.0 for i, p in enumerate(kept)]
    wanted = [p / sum(kept) for p in kept]
    counts = count_draws(steps, rows=1, times=20_000)
    assert {i for i, c in enumerate(counts) if c} == {i for i, p in enumerate(wanted) if p}
    assert chi_square(counts, wanted) < CHI_SQUARE_1E_6[sum(p > 0 for p in wanted) - 1]


def test_what_is_excluded_is_never_drawn() -> None:
    scores = torch.tensor([[0.0, -math.inf, 5.0, -math.inf]])
    steps = plain([1])
    assert {int(steps(ids(t), scores.clone()).argmax()) for t in range(500)} == {0, 2}


def test_half_precision_scores_are_drawn_in_float32() -> None:
    steps = plain([1])
    assert steps(NO_IDS, torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


@given(st.integers(0, 5), st.floats(0.5, 3.0))
def test_the_repetition_penalty_is_transformers_own_but_for_padding(
    gap: int, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(gap)
    scores = torch.randn(2, 20, generator=generator)
    ids = torch.randint(0, 20, (2, 8), generator=generator)
    own = RepetitionPenaltyLogitsProcessor(penalty)
    assert torch.equal(RepetitionPenalty(penalty, [0, 0])(ids, scores), own(ids, scores))
    padded = torch.cat([torch.full((2, gap), 7), ids], 1)
    assert torch.equal(RepetitionPenalty(penalty, [gap, gap])(padded, scores), own(ids, scores))


@given(st.integers(0, 50), st.floats(0.05, 0.99), st.integers(2, 2000))
def test_top_p_leaves_what_transformers_own_leaves(seed: int, share: float, size: int) -> None:
    from transformers import TopPLogitsWarper

    scores = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) * 2
    own, found = TopPLogitsWarper(share)(NO_IDS, scores), sampling.TopP(share)(NO_IDS, scores)
    same = (own.isfinite() == found.isfinite()).all(-1)
    for row in (~same).nonzero()[:, 0].tolist():  # a token on the very edge, by rounding
        assert (own[row].isfinite() != found[row].isfinite()).sum() == 1
    assert torch.equal(
        own[own.isfinite() & found.isfinite()], scores[own.isfinite() & found.isfinite()]
    )


def test_the_noise_is_gumbels_whatever_it_is_asked_for() -> None:
    noise = sampling.gumbel(3, 7, torch.arange(200_000)).double()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    some = torch.tensor([5, 77, 131_071])
    assert torch.equal(sampling.gumbel(3, 7, some), noise[some].float())
    for other in (
        sampling.gumbel(3, 8, torch.arange(200_000)),
        sampling.gumbel(4, 7, torch.arange(200_000)),
    ):
        both = torch.stack((noise, other.double()))
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack((noise[:-1], noise[1:])))[0, 1])) < 0.01


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 8.0])
@pytest.mark.parametrize("shift", [0.0, -40.0, 1e4])
def test_the_largest_is_what_it_is_with_noise_on_every_token(spread: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(5)
    contested = 0
    for t in range(60):
        scores = torch.randn(2, 5000, generator=generator) * spread + shift
        scores[1, ::3] = -math.inf
        found = plain([8, 9])(ids(t), scores.clone())
        for row, seed, before in zip(found, (8, 9), scores, strict=True):
            whole = before + sampling.gumbel(seed, t, torch.arange(5000))
            assert row.argmax() == whole.argmax() and row.max() == whole.max()
            kept = row.isfinite()
            assert torch.equal(row[kept], whole[kept])
            contested += int(kept.sum())
    assert contested < 60 * 2 * 200  # most noise was never made


def test_rows_without_a_token_left_and_with_nan_are_as_argmax_finds_them() -> None:
    none = torch.full((1, 7), -math.inf)
    assert int(plain([1])(NO_IDS, none)[0].argmax()) == 0
    broken = torch.tensor([[0.0, math.nan, 3.0]])
    assert int(plain([1])(NO_IDS, broken)[0].argmax()) == 1
    endless = torch.tensor([[0.0, 2.0, math.inf]])
    assert int(plain([1])(NO_IDS, endless)[0].argmax()) == 2


def test_the_repetition_penalty_passes_over_tokens_that_can_not_be_said() -> None:
    scores = torch.tensor([[1.0, -2.0, 3.0]])
    found = RepetitionPenalty(2.0, [0])(torch.tensor([[3, 1, 7, 2]]), scores)
    assert found.tolist() == [[1.0, -4.0, 1.5]]
