"""A smaller model that guesses, phrase by phrase."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bmkit.runtime.row import likeliest
from bmkit.runtime.speculation.phrases import Phrases
from bmkit.runtime.speculation.policy import Bet, Costs, Experience, Record, paying
from bmkit.runtime.speculation.targets import Target
from bmkit.runtime.speculation.tree import Tree
from bmkit.runtime.speculation.window import Window

AT_ONCE = 64
"""Tokens that are read with guesses; more, as a prompt is."""
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
    then: list[Record] = field(default_factory=list)
    """For each token, what is known of those that came after one that it was as sure of."""

    @property
    def chances(self) -> list[float]:
        """Return the probability of each token, if the one before it is right."""
        return [r.chance for r in self.records]


class Draft:
    """A draft model beside a target: it reads what was said, and guesses what comes.

    Its forwards carry phrases of the pool as well, so that it moves more than one token at a time
    where it agrees with them, and a Jacobi window of `window` places and `levels` iterations, which
    finds such phrases (Ouroboros, arXiv 2402.13720).
    """

    def __init__(
        self,
        model: Target,
        *,
        phrases: int = 2,
        length: int = 6,
        context: int | None = None,
        window: int = 0,
        levels: int = 4,
        alike: bool = False,
    ) -> None:
        """Make a draft of `model`. One that is `alike`, its target rounded, is trusted at once."""
        self.model, self.phrases, self.length, self.context = model, phrases, length, context
        self.window, self.levels = window, levels
        self.windows: dict[int, Window] = {}
        self.found = Phrases(limit=2**16)
        """What its windows have found."""
        self.known: dict[int, list[int]] = {}
        self.room: dict[int, int] = {}
        """Of each place, tokens that it may come to have."""
        self.waiting: set[int] = set()
        """Places whose prompt is to be read when the draft is asked."""
        self.costs = Costs()
        chances = [max(step - 0.15, 0.1) for step in (*STEPS, 1.0)]
        usual = 0.9 if alike else 0.5
        self.records = [Record(max(chance, usual) if alike else chance) for chance in chances]
        self.then = [Record(usual) for _ in chances]
        """How often the token after a right one was right, by how sure the draft was of that."""
        self.overall = Record(usual)
        self.experience = Experience()
        """How often the draft itself says what a phrase says."""
        self.forwards = self.tokens = 0
        self.seconds = 0.0

    def begin(self, place: int, ids: Sequence[int], *, slots: int) -> None:
        """Take note of a prompt: it is read when the draft is first asked what follows."""
        self.room[place] = len(ids) + slots
        self.waiting.add(place)

    def unread(self, place: int, said: Sequence[int]) -> int:
        """Return how many tokens would be read before the first guess at what follows `said`."""
        known = self.known.get(place, [])
        if place in self.waiting:
            return len(said) - agreement(known, said)
        return max(len(said) - len(known), 1)

    def _read(self, place: int, ids: Sequence[int]) -> None:
        """Read a prompt, from where it differs from what the place has read."""
        self.waiting.discard(place)
        slots = max(self.room[place] - len(ids), 0)
        known = agreement(self.known.pop(place, []), ids)
        if not self._fits(len(ids)):
            return
        start = time.perf_counter()
        if self.window and self.model.trees:
            self.windows[place] = Window(self.window, self.levels, ids)
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

        `length(count, chance)` says whether to go on, after so many tokens, to another one that
        will be right with that chance, all before it as well. `choosers` take logits and the tokens
        so far; None takes the likeliest.
        """
        found = {p: Drafted([], []) for p in places}
        for place, said in places.items():
            behind = place in self.known and Draft.unread(self, place, said) > AT_ONCE
            if place in self.waiting or behind:
                self._read(place, said[:-1] or said)
        going = {p: 1.0 for p, said in places.items() if p in self.known and self._fits(len(said))}
        bets: dict[int, list[Bet]] = {p: [] for p in places}
        while going:
            trees = {p: self._tree(p, places[p], found[p], sources[p], bets[p]) for p in going}
            start = time.perf_counter()
            known = {p: self.known.pop(p) for p in trees}  # if stopped here, it knows nothing
            logits = self.model.forward(trees)
            heard = {p: _Said(own, whole=choosers[p] is not None) for p, own in logits.items()}
            self.known |= known
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self.forwards += 1
            if not self.model.recorded:
                self.costs.learn(sum(map(len, trees.values())), seconds)
            for place, tree in trees.items():
                going[place] = self._walk(
                    place,
                    tree,
                    heard[place],
                    found[place],
                    places[place],
                    choosers[place],
                    going[place],
                    length,
                )
            going = {
                p: chance
                for p, chance in going.items()
                if chance > 0 and self._fits(len(places[p]) + len(found[p].tokens))
            }
        for place, drafted in found.items():
            for bet in bets[place]:
                bet.settle(drafted.tokens)
        return found

    def _fits(self, tokens: int) -> bool:
        """Tell whether the model can read so many tokens and a phrase after them."""
        ahead = max(self.length, self.window + self.levels if self.window else 0)
        return self.context is None or tokens + ahead < self.context

    def _tree(
        self,
        place: int,
        said: Sequence[int],
        found: Drafted,
        sources: Sequence[Phrases],
        bets: list[Bet],
    ) -> Tree:
        """Return the tokens that the model hasn't read, with the phrases after them that pay."""
        whole = [*said, *found.tokens]
        known = self.known[place]
        agree = agreement(known, whole)
        self.model.cut(place, agree)
        del known[agree:]
        tree = Tree.of(whole[agree])
        unread = tree.add(whole[agree + 1 :], "", [1.0] * (len(whole) - agree - 1))
        if not self.model.trees or not (self.phrases or self.window):
            return tree
        end = unread[-1] if unread else 0
        for source in (*sources, self.found):
            for rank, (where, agreed) in enumerate(source.find(whole, self.phrases)):
                phrase = source.phrase(where, self.length)
                first, then = self.experience.records("", agreed, rank)
                tree.add(phrase, "", [first.chance, *[then.chance] * (len(phrase) - 1)], end)
                bets.append(Bet(len(found.tokens), phrase, first, then))
        tree = self._paying(tree, end)
        if place in self.windows:
            self.windows[place].add(tree, end)
        return tree

    def _paying(self, tree: Tree, end: int) -> Tree:
        """Keep the nodes up to `end`, and of those after it as many as make most tokens a second.

        A node that the draft agrees with is a token that it needn't read by itself.
        """
        phrases = [n for n in tree.best_first() if n > end]
        count = paying([tree.chances[n] for n in phrases], 1, end + 1, self.costs)
        return tree.kept([*range(1, end + 1), *phrases[:count]])

    def _walk(
        self,
        place: int,
        tree: Tree,
        heard: _Said,
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
            token, sure = self._choose(heard, node, choose, found.tokens)
            kind = sum(sure >= step for step in STEPS)
            found.tokens.append(token)
            found.records.append(self.records[kind])
            found.then.append(self.then[kind])
            self.tokens += 1
            chance *= self.records[kind].chance
            more = length(len(found.tokens), chance * self.then[kind].chance)
            below = tree.children[node].get(token)
            if below is None or not more:
                break
            node = below
            nodes.append(below)
        if place in self.windows:
            best = heard.likeliest()
            if self.model.said is not None:
                best = self.model.said[torch.tensor(best)].tolist()
            for phrase in self.windows[place].learn(best, len(nodes) - count + 1):
                self.found.extend(phrase)
                self.found.end()
            self.found.trim()
        known = self.known.pop(place)
        self.model.keep(place, nodes)
        self.known[place] = [*known, *(tree.tokens[n] for n in nodes)]
        return chance if more else 0.0

    def _choose(
        self, heard: _Said, node: int, choose: Chooser | None, drafted: Sequence[int]
    ) -> tuple[int, float]:
        """Return what the model says after a node, and how likely it finds that."""
        said = self.model.said
        if choose is None:
            best, sure = heard.judged(node)
            return (best if said is None else int(said[best])), sure
        scores = heard.logits[node]
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
            if i < min(right, tried - 1) and i < len(drafted.then):
                drafted.then[i].learn(float(i + 1 < right))


class _Said:
    """What a model says after each node of a tree, by its logits [nodes, vocabulary].

    A device is waited for once; with `whole`, all logits come from it.
    """

    def __init__(self, logits: Tensor, *, whole: bool) -> None:
        self.logits = logits
        self.told: tuple[list[float], list[float]] = ([], [])
        self.apart = logits.device.type != "cpu"
        if self.apart and whole:
            self.logits, self.apart = logits.cpu(), False
        elif self.apart:
            best, where = logits.max(-1)
            sure = (best - logits.logsumexp(-1)).exp()
            where, sure = torch.stack((where.double(), sure.double())).tolist()
            self.told = (where, sure)

    def judged(self, node: int) -> tuple[int, float]:
        """Return the likeliest token after a node, and its probability."""
        if self.apart:
            return int(self.told[0][node]), self.told[1][node]
        scores = self.logits[node]
        (token,), (score,) = likeliest(scores[None])
        return token, math.exp(score - float(scores.logsumexp(-1)))

    def likeliest(self) -> list[int]:
        """Return the likeliest token after each node."""
        return [int(x) for x in self.told[0]] if self.apart else likeliest(self.logits)[0]
