"""A smaller model that guesses, phrase by phrase."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmkit.runtime.speculation.phrases import Phrases
from bmkit.runtime.speculation.policy import Costs, Record
from bmkit.runtime.speculation.targets import Target
from bmkit.runtime.speculation.tree import Tree

Chooser = Callable[[Tensor, Sequence[int]], int]
STEPS = (0.3, 0.5, 0.7, 0.85, 0.95)
"""Bounds between the classes of a draft's own probability of its guess."""


def agreement(known: Sequence[int], whole: Sequence[int]) -> int:
    """Return how many first tokens of `whole` are those that are known; never all of it."""
    pairs = enumerate(zip(known, whole, strict=False))
    found = next((i for i, (a, b) in pairs if a != b), len(known))
    return min(found, len(whole) - 1)


@dataclass
class Drafted:
    """What a draft has guessed for one prompt."""

    tokens: list[int]
    records: list[Record]
    """For each token, what is known of guesses that the draft was as sure of."""

    @property
    def chances(self) -> list[float]:
        """Return the probability of each token, if the one before it is right."""
        return [r.chance for r in self.records]


class Draft:
    """A draft model beside a target: it reads what was said, and guesses what comes.

    Its forwards carry phrases of the pool as well, so that it moves more than one token at a time
    where it agrees with them (Ouroboros, arXiv 2402.13720).
    """

    def __init__(self, model: Target, *, phrases: int = 2, length: int = 6) -> None:
        self.model, self.phrases, self.length = model, phrases, length
        self.known: dict[int, list[int]] = {}
        self.costs = Costs()
        self.records = [Record(max((*STEPS, 1.0)[i] - 0.15, 0.1)) for i in range(len(STEPS) + 1)]
        self.overall = Record(0.5)
        self.forwards = self.tokens = 0
        self.seconds = 0.0

    def begin(self, place: int, ids: Sequence[int], *, slots: int) -> None:
        """Read a prompt, from where it differs from what the place has read."""
        start = time.perf_counter()
        known = agreement(self.known.pop(place, []), ids)
        self.model.begin(place, ids, slots=slots, adapter=None, known=known)
        self.known[place] = list(ids)
        self.seconds += time.perf_counter() - start

    def guess(
        self,
        places: Mapping[int, Sequence[int]],
        choosers: Mapping[int, Chooser | None],
        length: Callable[[int, float], bool],
        sources: Mapping[int, Sequence[Phrases]],
    ) -> dict[int, Drafted]:
        """Guess what follows `places`, each with all tokens of its prompt and answer.

        `length(count, chance)` says whether to go on, after so many tokens that are right with that
        chance. `choosers` take logits and the tokens so far; None takes the likeliest.
        """
        found = {p: Drafted([], []) for p in places}
        going = dict.fromkeys(places, 1.0)
        while going:
            trees = {p: self._tree(p, [*places[p], *found[p].tokens], sources[p]) for p in going}
            start = time.perf_counter()
            logits = self.model.forward(trees)
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self.forwards += 1
            self.costs.learn(sum(map(len, trees.values())), seconds)
            for place, tree in trees.items():
                going[place] = self._walk(
                    place,
                    tree,
                    logits[place],
                    found[place],
                    places[place],
                    choosers[place],
                    going[place],
                    length,
                )
            going = {p: chance for p, chance in going.items() if chance > 0}
        return found

    def _tree(self, place: int, whole: list[int], sources: Sequence[Phrases]) -> Tree:
        """Return the tokens that the model hasn't read, with phrases after them."""
        known = self.known[place]
        agree = agreement(known, whole)
        self.model.cut(place, agree)
        del known[agree:]
        tree = Tree.of(whole[agree])
        at = tree.add(whole[agree + 1 :], "", [1.0] * (len(whole) - agree - 1))
        if self.model.trees and self.phrases:
            for source in sources:
                for where, _ in source.find(whole, self.phrases):
                    phrase = source.phrase(where, self.length)
                    tree.add(phrase, "", [0.5] * len(phrase), at[-1] if at else 0)
        return tree

    def _walk(
        self,
        place: int,
        tree: Tree,
        logits: Tensor,
        found: Drafted,
        said: Sequence[int],
        choose: Chooser | None,
        chance: float,
        length: Callable[[int, float], bool],
    ) -> float:
        """Add what the model says along the tree; return the chance of it all, 0 to stop."""
        count = len(said) + len(found.tokens) - self.model.length(place)
        node = count - 1  # the last of those that were known; phrases come after it
        nodes = list(range(count))
        while True:
            scores = logits[node]
            token, sure = self._choose(scores, choose, found.tokens)
            record = self.records[sum(sure >= step for step in STEPS)]
            found.tokens.append(token)
            found.records.append(record)
            self.tokens += 1
            chance *= record.chance
            more = length(len(found.tokens), chance)
            below = tree.children[node].get(token)
            if below is None or not more:
                break
            node = below
            nodes.append(below)
        self.model.keep(place, nodes)
        self.known[place] += [tree.tokens[n] for n in nodes]
        return chance if more else 0.0

    def _choose(
        self, scores: Tensor, choose: Chooser | None, drafted: Sequence[int]
    ) -> tuple[int, float]:
        """Return what the model says, and how likely it finds that."""
        said = self.model.said
        if choose is None:
            best = int(scores.argmax())
            sure = float((scores[best] - scores.logsumexp(-1)).exp())
            return (best if said is None else int(said[best])), sure
        if said is not None:
            whole = scores.new_full((self.model.vocabulary,), -torch.inf)
            whole[said] = scores
            scores = whole
        token = choose(scores, drafted)
        return token, float((scores[token] - scores.logsumexp(-1)).exp())

    def learn(self, drafted: Drafted, right: int, tried: int) -> None:
        """Note that the first `right` of `tried` guesses were what the target said."""
        for i, record in enumerate(drafted.records[:tried]):
            if i > right:
                break
            record.learn(float(i < right))
            self.overall.learn(float(i < right))
