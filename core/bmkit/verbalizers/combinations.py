"""Label words by combinations: all are tried on rows' scores (LM-BFF, arXiv 2012.15723)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from bmkit.errors import InputError
from bmkit.prompting.labelwords import LabelWords, Word

Over = Literal["logarithms", "probabilities"]
DECIMALS = 9
"""Of log-likelihoods: what the order of additions changes decides nothing."""
AT_ONCE = 2**22
"""So many scores of words are in memory at a time: 32 MB in float64, some times over."""


@dataclass(frozen=True)
class Candidates:
    """Sets of words that may stand for each label."""

    labels: tuple[str, ...]
    words: tuple[Word, ...]
    """All words of all sets, each once."""
    sets: tuple[tuple[int, ...], ...]
    """Places of words."""
    own: tuple[tuple[int, ...], ...]
    """The sets of each label."""

    @classmethod
    def of(
        cls, given: Sequence[tuple[str, Sequence[Sequence[Word]]]], *, first_only: bool = False
    ) -> Candidates:
        """Return the sets of each label, by its name; those with the same words are one.

        With `first_only` words are the same if their first tokens are.
        """
        words: dict[tuple[int, ...], int] = {}
        texts: list[Word] = []
        sets: dict[frozenset[tuple[int, ...]], int] = {}
        places: list[tuple[int, ...]] = []
        own: list[tuple[int, ...]] = []
        for _, listed in given:
            numbers: dict[int, None] = {}
            for some in listed:
                for word in some:
                    if words.setdefault(word.ids, len(words)) == len(texts):
                        texts.append(word)
                key = frozenset(word.ids[:1] if first_only else word.ids for word in some)
                number = sets.setdefault(key, len(sets))
                if number == len(places):
                    places.append(tuple(dict.fromkeys(words[word.ids] for word in some)))
                numbers[number] = None
            own.append(tuple(numbers))
        names = tuple(name for name, _ in given)
        return cls(names, tuple(texts), tuple(places), tuple(own))

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """Return the places of words in each set, [sets, words], and whether there is one."""
        most = max(map(len, self.sets))
        places = torch.zeros(len(self.sets), most, dtype=torch.long)
        there = torch.zeros(places.shape, dtype=torch.bool)
        for number, own in enumerate(self.sets):
            places[number, : len(own)] = torch.tensor(own)
            there[number, : len(own)] = True
        return places, there

    def label_words(self, combination: Sequence[int]) -> LabelWords:
        """Return the words of a combination: of each label, the number of a set."""
        words = tuple(tuple(self.words[at] for at in self.sets[one]) for one in combination)
        return LabelWords(self.labels, words)


@dataclass(frozen=True)
class Scores:
    """What a model says of words at the masks of rows, and what is divided away."""

    words: Tensor
    """[rows, words]: a score of each word, as `manual.word_scores` makes it."""
    right: Tensor
    """[rows]: labels, as numbers."""
    prior: Tensor | None = None
    """[inputs, words]: the same of inputs that say nothing, or of rows without labels."""
    over: Over = "logarithms"

    def of(self, rows: Tensor) -> Scores:
        """Return those of some rows, by their places or a mask."""
        return Scores(self.words[rows], self.right[rows], self.prior, self.over)


@dataclass(frozen=True)
class Ranked:
    """Combinations, the best one first, with how well they tell the labels of rows."""

    combinations: Tensor
    """[combinations, labels]: numbers of sets."""
    right: Tensor
    """[combinations]: how many rows' labels are told rightly."""
    loglikelihood: Tensor
    """[combinations]: the mean logarithm of the right label's probability."""
    tried: int
    """How many were scored."""


def likeliest(logprobs: Tensor, allowed: Tensor, count: int) -> list[list[int]]:
    """Return the `count` likeliest of the `allowed` tokens [vocabulary] for each label.

    `logprobs` [labels, vocabulary] are sums over a label's rows. Of equals the lower
    token is first.
    """
    _, order = logprobs.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True)
    found: list[list[int]] = order[:, : min(count, int(allowed.sum()))].tolist()
    return found


def label_logprobs(scores: Scores, candidates: Candidates, combinations: Tensor) -> Tensor:
    """Return log-probabilities of labels, [rows, combinations, labels].

    They are those of `labels.Verbalizer` with a combination's words, for all combinations together.
    What only moves all labels of a row alike is left out, as labels sum to one.
    """
    places, there = (part[combinations] for part in candidates.table)  # [combinations, labels, n]
    found = scores.words.double()[:, places].masked_fill(~there, -torch.inf)
    if scores.prior is not None:
        said = scores.prior.double()[:, places].masked_fill(~there, -torch.inf)
        said = said - said.flatten(2).logsumexp(-1)[..., None, None]
        found = torch.where(there, found - said.logsumexp(0), -torch.inf)
    if scores.over == "probabilities":
        labels = found.logsumexp(-1) - there.sum(-1).log()
    else:
        labels = found.masked_fill(~there, 0.0).sum(-1) / there.sum(-1)
    return labels.log_softmax(-1)


def measure(scores: Scores, candidates: Candidates, combinations: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each combination how many labels it tells, and the mean log-likelihood of them.

    Peak memory: some times AT_ONCE numbers, or the words of one combination.
    """
    counts, means = [], []
    rows = len(scores.right) + (0 if scores.prior is None else len(scores.prior))
    size = rows * combinations.shape[1] * candidates.table[0].shape[1]
    step = max(1, AT_ONCE // max(size, 1))
    for at in range(0, len(combinations), step):
        part = combinations[at : at + step]
        found = label_logprobs(scores, candidates, part)
        right = scores.right[:, None].expand(found.shape[:2])
        counts.append((found.argmax(-1) == right).sum(0))
        means.append(found.gather(-1, right[..., None])[..., 0].mean(0))
    return torch.cat(counts), torch.cat(means).round(decimals=DECIMALS)


def rank(scores: Scores, candidates: Candidates, *, limit: int, keep: int) -> Ranked:
    """Return the `keep` combinations that tell most rows, and the first set of each label.

    Labels get their sets one after the other. All combinations are tried if there are `limit` or
    fewer; else those of the labels so far that tell these labels' rows best go on, as many as
    `limit` allows. No two labels have the same set. Of equals the one of the higher likelihood
    comes first, then that of the earlier sets. Raises InputError if no combination is left.
    """
    found = torch.tensor(candidates.own[0])[:, None]
    tried = 0
    for label in range(1, len(candidates.own)):
        own = torch.tensor(candidates.own[label])
        room = max(1, limit // len(own))
        if len(found) > room:
            order, *_ = _order(scores.of(scores.right < label), candidates, found)
            tried += len(found)
            found = found[order[:room]]
        found = torch.cat(
            [found.repeat_interleave(len(own), 0), own.repeat(len(found))[:, None]], 1
        )
        found = found[(found[:, :-1] != found[:, -1:]).all(1)]
    usual = torch.tensor([[own[0] for own in candidates.own]])
    if len(set(usual[0].tolist())) == len(usual[0]) and not (found == usual).all(1).any():
        found = torch.cat([usual, found])
    if not len(found):
        raise InputError(
            "search: no combination of label words is left: labels have the same candidates alone",
            hint="raise search.num_candidates, or give each label words of its own",
        )
    order, right, means = _order(scores, candidates, found)
    tried += len(found)
    places = order[:keep]
    first = (found[order] == usual).all(1).nonzero()
    if len(first) and int(first[0]) >= keep:
        places = torch.cat([places, order[first[0]]])
    return Ranked(found[places], right[places], means[places], tried)


def _order(
    scores: Scores, candidates: Candidates, combinations: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places of combinations, the best one first, and their figures by place."""
    right, means = measure(scores, candidates, combinations)
    return ordered(right, means), right, means


def ordered(right: Tensor, loglikelihood: Tensor) -> Tensor:
    """Return places by how many are right, then by likelihood, then as they came."""
    order = loglikelihood.argsort(descending=True, stable=True)
    return order[right[order].argsort(descending=True, stable=True)]


def folds(right: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Yield for each of `count` parts which rows are in it, [rows], as many of each label."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.empty_like(right)
    for label in range(int(right.max()) + 1):
        places = (right == label).nonzero()[:, 0]
        places = places[torch.randperm(len(places), generator=generator)]
        part[places] = torch.arange(len(places)) % count
    for number in range(count):
        yield part == number
