"""Label words by combinations: scores as the verbalizer's, ranks as by brute force."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor

from bmkit.errors import InputError
from bmkit.prompt.labels import Verbalizer
from bmkit.prompting.labelwords import Word
from bmkit.verbalizers import combinations
from bmkit.verbalizers.combinations import Candidates, Scores

LABELS = ("bad", "good", "odd")


def draw(rows: int, words: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, words, generator=torch.Generator().manual_seed(seed))


def word(number: int) -> Word:
    return Word(f" w{number}", (number,))


def candidates(*own: list[list[int]]) -> Candidates:
    """Candidates by label, each a list of tokens."""
    given = [
        (name, [[word(token) for token in some] for some in listed])
        for name, listed in zip(LABELS, own, strict=False)
    ]
    return Candidates.of(given)


def scores(found: Candidates, said: Tensor, right: list[int], **more: Tensor | str) -> Scores:
    """Scores of a vocabulary's tokens, as those of the words of candidates."""
    tokens = [one.ids[0] for one in found.words]
    prior = more.get("prior")
    over: Literal["logarithms", "probabilities"] = more.get("over", "logarithms")  # type: ignore[assignment]
    held = prior[:, tokens] if isinstance(prior, Tensor) else None
    return Scores(said[:, tokens], torch.tensor(right), held, over)


MIXED = ([[0], [1, 2], [3, 4, 5]], [[6, 7], [8]], [[9], [1], [2, 10]])


@pytest.mark.parametrize("over", ["logarithms", "probabilities"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_all_combinations_tell_what_a_verbalizer_tells_with_each(
    over: Literal["logarithms", "probabilities"], calibrated: bool
) -> None:
    found = candidates(*MIXED)
    said, prior = draw(7, 12), draw(4, 12, seed=1)
    more: dict[str, Tensor | str] = {"over": over}
    if calibrated:
        more["prior"] = prior
    all_ = torch.tensor(list(itertools.product(*found.own)))
    assert len(all_) == 18
    told = combinations.label_logprobs(scores(found, said, [0] * 7, **more), found, all_)
    for place, one in enumerate(all_.tolist()):
        words = found.label_words(one)
        verbalizer = Verbalizer(words, over=over)
        if calibrated:
            verbalizer = verbalizer.calibrated(prior[:, list(words.token_ids)])
        wanted = verbalizer.label_logprobs(said[:, list(words.token_ids)])
        torch.testing.assert_close(told[:, place].float(), wanted)


def test_ranks_are_those_of_brute_force_and_parts_of_memory_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = candidates(*MIXED)
    right = [0, 1, 2, 0, 1, 2, 2]
    own = scores(found, draw(7, 12), right)
    ranked = combinations.rank(own, found, limit=1000, keep=1000)
    wanted = []
    for one in itertools.product(*found.own):
        if len(set(one)) == 3:
            logprobs = Verbalizer(found.label_words(one)).label_logprobs(
                draw(7, 12)[:, list(found.label_words(one).token_ids)]
            )
            hits = (logprobs.argmax(-1) == torch.tensor(right)).sum()
            mean = logprobs[range(7), right].mean()
            wanted.append((-int(hits), -round(float(mean), 4), one))
    wanted.sort()
    assert ranked.tried == len(wanted) == 18
    assert [-hits for hits, *_ in wanted] == ranked.right.tolist()
    assert [tuple(one) for one in ranked.combinations.tolist()] == [one for *_, one in wanted]
    monkeypatch.setattr(combinations, "AT_ONCE", 1)
    again = combinations.rank(own, found, limit=1000, keep=1000)
    assert torch.equal(again.combinations, ranked.combinations)
    assert torch.equal(again.loglikelihood, ranked.loglikelihood)


def test_with_a_limit_the_best_of_the_labels_so_far_go_on() -> None:
    own = [[[number] for number in range(at, 30, 3)] for at in range(3)]
    found = candidates(*own)
    right = [0, 1, 2] * 8
    said = scores(found, draw(24, 30), right)
    whole = combinations.rank(said, found, limit=10**6, keep=5)
    limited = combinations.rank(said, found, limit=400, keep=5)
    assert whole.tried == 1000
    assert limited.tried == 100 + 400
    assert limited.right[0] >= whole.right[4]
    two = combinations.rank(said.of(said.right < 2), candidates(*own[:2]), limit=100, keep=40)
    on = _tokens(found, two)[:40]
    assert {one[:2] for one in _tokens(found, limited)} - {(0, 1)} <= set(on)


def _tokens(found: Candidates, ranked: combinations.Ranked) -> list[tuple[int, ...]]:
    return [
        tuple(found.words[found.sets[own][0]].ids[0] for own in one)
        for one in ranked.combinations.tolist()
    ]


def test_the_first_sets_are_always_there_however_badly_they_tell() -> None:
    found = candidates([[0], [1]], [[2], [3]])
    said = torch.tensor([[-9.0, 0.0, 9.0, 1.0], [9.0, 1.0, -9.0, 2.0]])
    ranked = combinations.rank(scores(found, said, [0, 1]), found, limit=100, keep=1)
    assert _tokens(found, ranked)[-1] == (0, 2)
    assert ranked.right.tolist()[-1] == 0
    assert len(ranked.combinations) == 2


def test_equals_are_ordered_by_their_sets() -> None:
    found = candidates([[0], [1], [2]], [[3], [4]])
    said = torch.zeros(2, 5)
    ranked = combinations.rank(scores(found, said, [0, 1]), found, limit=100, keep=100)
    assert _tokens(found, ranked) == [(a, b) for a in range(3) for b in (3, 4)]


def test_labels_never_get_the_same_set_in_any_order_of_its_words() -> None:
    found = candidates([[0, 1], [2]], [[1, 0], [3]])
    ranked = combinations.rank(scores(found, draw(4, 4), [0, 1, 0, 1]), found, limit=99, keep=99)
    assert ranked.tried == 3
    with pytest.raises(InputError, match="no combination"):
        same = candidates([[0]], [[0]])
        combinations.rank(scores(same, draw(2, 1), [0, 1]), same, limit=99, keep=99)


def test_words_with_the_same_first_token_are_one_where_only_that_counts() -> None:
    given = [("a", [[Word(" xy", (1, 2))], [Word(" xz", (1, 3))]]), ("b", [[word(4)]])]
    assert list(map(len, Candidates.of(given).own)) == [2, 1]
    assert list(map(len, Candidates.of(given, first_only=True).own)) == [1, 1]


def test_the_likeliest_tokens_are_the_allowed_ones_of_the_highest_sums() -> None:
    sums = torch.tensor([[-1.0, -3.0, -2.0, -2.0], [-4.0, -1.0, -1.5, -9.0]])
    allowed = torch.tensor([False, True, True, True])
    assert combinations.likeliest(sums, allowed, 2) == [[2, 3], [1, 2]]
    assert combinations.likeliest(sums, allowed, 9) == [[2, 3, 1], [1, 2, 3]]


def test_each_row_is_held_out_once_and_labels_are_even() -> None:
    right = torch.tensor([0] * 8 + [1] * 5)
    parts = list(combinations.folds(right, 4, seed=3))
    assert torch.stack(parts).sum(0).tolist() == [1] * 13
    assert [int((right[part] == 0).sum()) for part in parts] == [2] * 4
    assert sorted(int((right[part] == 1).sum()) for part in parts) == [1, 1, 1, 2]
    again = list(combinations.folds(right, 4, seed=3))
    other = list(combinations.folds(right, 4, seed=4))
    assert torch.equal(torch.stack(again), torch.stack(parts))
    assert not torch.equal(torch.stack(other), torch.stack(parts))
