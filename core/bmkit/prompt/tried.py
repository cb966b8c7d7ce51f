"""Label words tried on one template: its states are made once, the head tells all combinations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmkit.prompt.ask import Asker
from bmkit.prompt.heads import Head
from bmkit.prompt.ready import Ready
from bmkit.prompt.rounds import Rows
from bmkit.prompt.searching import Search, listed
from bmkit.prompt.wording import allowed
from bmkit.prompting import labelwords
from bmkit.prompting.labelwords import LabelWords, Word
from bmkit.verbalizers import combinations, manual
from bmkit.verbalizers.combinations import Candidates, Ranked, Scores
from bmkit.verbalizers.manual import Columns


@dataclass(frozen=True)
class Figures:
    """How well labels of some rows are told."""

    accuracy: float
    loglikelihood: float
    """The mean logarithm of the right label's probability."""


@dataclass(frozen=True)
class Pair:
    """A template, by its number, with label words."""

    template: int
    words: LabelWords
    train: Figures
    held_out: Figures
    """On dev; without it on parts of train, with words that the other parts chose."""

    @property
    def rank(self) -> tuple[float, float, float, float]:
        """Return what pairs are ordered by, the lowest first."""
        return (
            *(-self.held_out.accuracy, -self.held_out.loglikelihood),
            *(-self.train.accuracy, -self.train.loglikelihood),
        )


class Tried:
    """One template on the rows of a run: what a head reads at their masks."""

    def __init__(
        self,
        ready: Ready,
        asker: Asker,
        train: Rows,
        dev: Rows | None,
        heard: Callable[[int], None] | None = None,
    ) -> None:
        """Ask the model once about each row. Raises BmkitError for rows that don't fit."""
        self.ready = ready
        prior = ready.prior_anew()
        asked = {"train": train.prompts, "dev": dev.prompts if dev else [], "prior": prior}
        self.states = {n: asker.states(own, heard) for n, own in asked.items() if own}
        self.head = Head(asker, train.prompts[0])
        self.right = {n: _numbers(rows) for n, rows in (("train", train), ("dev", dev)) if rows}
        spec = ready.recipe.search
        assert spec is not None  # it is what this is made for
        self.spec: Search = spec
        self._known: dict[tuple[int, ...], Word] = {}

    def pairs(self, number: int) -> tuple[list[Pair], int]:
        """Return the best pairs of this template, and how many combinations were tried."""
        if "dev" in self.right:
            return self._by_dev(number)
        return self._by_parts(number)

    def _by_dev(self, number: int) -> tuple[list[Pair], int]:
        candidates, ranked = self._rank(torch.ones_like(self.right["train"], dtype=torch.bool))
        scores = self._scores("dev", candidates)
        right, means = combinations.measure(scores, candidates, ranked.combinations)
        held = _figures(right, means, len(scores.right))
        return self._listed(number, candidates, ranked, held), ranked.tried

    def _by_parts(self, number: int) -> tuple[list[Pair], int]:
        """Hold out each part once: the words that the others choose are measured on it."""
        right = self.right["train"]
        count = min(self.spec.folds, int(right.bincount().min()))
        told, likely, tried = 0, 0.0, 0
        for part in combinations.folds(right, count, self.ready.recipe.seed):
            candidates, ranked = self._rank(~part, keep=1)
            scores = self._scores("train", candidates).of(part)
            hits, mean = combinations.measure(scores, candidates, ranked.combinations[:1])
            told += int(hits[0])
            likely += float(mean[0]) * int(part.sum())
            tried += ranked.tried
        candidates, ranked = self._rank(torch.ones_like(right, dtype=torch.bool))
        held = Figures(told / len(right), likely / len(right))
        whole = [held] * len(ranked.combinations)
        return self._listed(number, candidates, ranked, whole), tried + ranked.tried

    def _listed(
        self, number: int, candidates: Candidates, ranked: Ranked, held: Sequence[Figures]
    ) -> list[Pair]:
        train = _figures(ranked.right, ranked.loglikelihood, len(self.right["train"]))
        return [
            Pair(number, candidates.label_words(one), own, out)
            for one, own, out in zip(ranked.combinations.tolist(), train, held, strict=True)
        ]

    def _rank(self, rows: Tensor, keep: int | None = None) -> tuple[Candidates, Ranked]:
        """Return candidates by some rows of train, and their combinations ranked on these."""
        candidates = self._candidates(rows)
        ranked = combinations.rank(
            self._scores("train", candidates).of(rows),
            candidates,
            limit=self.spec.max_combinations,
            keep=keep or self.spec.num_combinations,
        )
        return candidates, ranked

    def _candidates(self, rows: Tensor) -> Candidates:
        """Return the sets of each label: the verbalizer's, those given, the likeliest tokens."""
        spec, ready = self.spec, self.ready
        names = ready.classes.names
        likely: list[list[Word]] = [[] for _ in names]
        if spec.num_candidates:
            sums = self.head.sums(self.states["train"][rows], self.right["train"][rows], len(names))
            tokens = combinations.likeliest(
                sums, allowed(ready, sums.shape[1]), spec.num_candidates
            )
            likely = [[self._word(token) for token in own] for own in tokens]
        given = [
            [own, *_given(ready, label), *([word] for word in more)]
            for label, own, more in zip(names, ready.words.words, likely, strict=True)
        ]
        first = ready.recipe.verbalizer.multi_token_handler == "first"
        return Candidates.of(list(zip(names, given, strict=True)), first_only=first)

    def _word(self, token: int) -> Word:
        key = (token,)
        if key not in self._known:
            self._known[key] = Word(self.ready.tokenizer.decode([token]), key)
        return self._known[key]

    def _scores(self, split: str, candidates: Candidates) -> Scores:
        spec = self.ready.recipe.verbalizer
        prior = self.states.get("prior")
        return Scores(
            self._said(self.states[split], candidates),
            self.right[split],
            None if prior is None else self._said(prior, candidates),
            spec.aggregate,
        )

    def _said(self, states: Tensor, candidates: Candidates) -> Tensor:
        """Return the scores of all candidates' words, [rows, words]."""
        handler: Any = self.ready.recipe.verbalizer.multi_token_handler
        columns = Columns.of(LabelWords(("all",), (candidates.words,)))
        held = self.head.columns(states, columns.token_ids)
        return manual.word_scores(held, columns, handler)[:, 0]


def best(pairs: Sequence[Pair]) -> list[Pair]:
    """Return all pairs, the best one first: by what was held out, by train, then as they came."""
    return sorted(pairs, key=lambda pair: pair.rank)


def in_turns(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Return `count` of the best pairs: the best of each template, then the second ones of each."""
    seen: dict[int, int] = {}
    turns = []
    for pair in best(pairs):
        seen[pair.template] = turn = seen.get(pair.template, -1) + 1
        turns.append((turn, pair))
    return [pair for _, pair in sorted(turns, key=lambda one: one[0])[:count]]


def _given(ready: Ready, label: str) -> list[tuple[Word, ...]]:
    """Return the candidates that a recipe gives a label. Raises InputError for what is no word."""
    spec, search = ready.recipe.verbalizer, ready.recipe.search
    assert search is not None  # as above
    found = []
    for own in listed(search.label_words.get(label, [])):
        words = {label: listed(own)}
        whole = spec.type == "one_to_one"
        made = labelwords.resolve(words, ready.tokenizer, prefix=spec.prefix, whole=whole)
        found.append(made.words[0])
    return found


def _numbers(rows: Rows) -> Tensor:
    return torch.tensor([own[0] for own in rows.right])


def _figures(right: Tensor, means: Tensor, rows: int) -> list[Figures]:
    return [
        Figures(hits / rows, mean)
        for hits, mean in zip(right.tolist(), means.tolist(), strict=True)
    ]
