"""How much to guess: what a forward costs, how often guesses were right, and what pays."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bmkit.runtime.speculation.tree import Tree

FORGET = 0.97
"""How much an earlier observation of a guess weighs against the next one."""
LEVEL, SHAPE = 0.2, 0.03
"""How much a new measurement weighs against those before: for all sizes, and for its own."""
SLOPE = 0.1
"""What a token more is believed to cost, of a forward of one, until it was measured."""


class Costs:
    """Seconds of a forward by its number of tokens: as measured, and corrected on the way.

    The level, which follows the length of what is in the cache and what else the machine does, is
    learned quickly; the ratios between sizes slowly.
    """

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self.level = 1.0
        self._known: dict[int, float] = {}

    def learn(self, tokens: int, seconds: float) -> None:
        """Note what a forward of `tokens` took; one that was held up counts as twice the known."""
        if not self.seconds:
            self.seconds[tokens] = seconds
            return
        ratio = min(max(seconds / self.of(tokens), 0.5), 2.0)
        self.level *= ratio**LEVEL
        if tokens in self.seconds:
            self.seconds[tokens] *= ratio**SHAPE
            self._known.clear()

    def of(self, tokens: int) -> float:
        """Return the seconds that a forward of `tokens` takes: at least those of a smaller one."""
        if tokens not in self._known:
            self._known[tokens] = self._shape(tokens)
        return self._known[tokens] * self.level

    def _shape(self, tokens: int) -> float:
        if not self.seconds:
            return 1.0 + SLOPE * (tokens - 1)
        sizes = sorted(self.seconds)
        at = bisect.bisect_left(sizes, tokens)
        if at < len(sizes) and sizes[at] == tokens:
            return max(self.seconds[size] for size in sizes[: at + 1])
        if at == 0:
            return self.seconds[sizes[0]]
        low = sizes[at - 1]
        floor = max(self.seconds[size] for size in sizes[:at])
        if at < len(sizes):
            share = (tokens - low) / (sizes[at] - low)
            return floor + share * max(self.seconds[sizes[at]] - floor, 0.0)
        if len(sizes) == 1:
            return floor * (1 + SLOPE * (tokens - low) / low)
        return floor + max(floor - self.seconds[sizes[-2]], 0.0) * (tokens - low) / (
            low - sizes[-2]
        )

    def table(self) -> dict[int, float]:
        """Return the seconds of each size that was measured."""
        return {size: self.of(size) for size in self.seconds}


class Pace:
    """Tokens and seconds of the latest rounds."""

    def __init__(self) -> None:
        self.tokens = self.seconds = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        """Note a round."""
        self.tokens = self.tokens * FORGET + tokens
        self.seconds = self.seconds * FORGET + seconds


class Record:
    """How often guesses of a kind were right, the latest weighing most."""

    def __init__(self, chance: float, weight: float = 4.0) -> None:
        self.right, self.all = chance * weight, weight

    def learn(self, right: float, count: float = 1.0) -> None:
        """Note `count` guesses, of which `right` were right."""
        keep = FORGET**count
        self.right = self.right * keep + right
        self.all = self.all * keep + count

    @property
    def chance(self) -> float:
        """Return the probability that the next one is right."""
        return min(max(self.right / self.all, 0.001), 0.999)


def bucket(agree: int) -> int:
    """Return the class of a match by its length."""
    return agree if agree <= 4 else 5 if agree < 8 else 6


class Experience:
    """What became of guesses, by where they came from."""

    PRIOR = (0.05, 0.12, 0.3, 0.45, 0.6, 0.7, 0.85)
    """What is believed of a match by its class, before anything was seen."""

    def __init__(self) -> None:
        self.first: dict[tuple[str, int, int], Record] = {}
        self.then: dict[tuple[str, int], Record] = {}

    def records(self, source: str, agree: int, rank: int) -> tuple[Record, Record]:
        """Return what is known of a first token, and of each that follows a right one."""
        kind, rank = bucket(agree), min(rank, 3)
        first = self.first.get((source, kind, rank))
        if first is None:
            chance = self.PRIOR[kind] * 0.4**rank
            first = self.first[source, kind, rank] = Record(chance)
        then = self.then.get((source, kind))
        if then is None:
            then = self.then[source, kind] = Record(min(self.PRIOR[kind] + 0.3, 0.9))
        return first, then


@dataclass
class Bet:
    """A phrase that was guessed at a place of the answer: it is settled when that is known."""

    start: int
    tokens: list[int]
    first: Record
    then: Record

    def settle(self, made: Sequence[int]) -> None:
        """Compare with what was said: `made` is the answer so far."""
        said = made[self.start : self.start + len(self.tokens)]
        right = 0
        for guess, token in zip(self.tokens, said, strict=False):
            if guess != token:
                break
            right += 1
        if not said:
            return
        self.first.learn(float(right > 0))
        tried = min(right + 1, len(said)) - 1
        if right and tried > 0:
            self.then.learn(float(right - 1), float(tried))


def paying(chances: Sequence[float], sure: int, nodes: int, costs: Costs) -> int:
    """Return how many guesses, the likeliest first, make the most tokens a second.

    `sure` tokens come without any, from a forward of `nodes`.
    """
    expected, best, count = float(sure), sure / costs.of(nodes), 0
    for i, chance in enumerate(chances, 1):
        expected += chance
        rate = expected / costs.of(nodes + i)
        if rate > best:
            best, count = rate, i
    return count


def choose(trees: Sequence[Tree], costs: Costs, *, most: int) -> list[Tree]:
    """Keep of each tree what makes the most tokens a second; `most` nodes in all.

    Nodes are taken in order of their chances, over all trees; each adds its chance to the tokens
    that are expected, and makes the forward longer.
    """
    ranked = sorted(
        ((tree.chances[n], i, n) for i, tree in enumerate(trees) for n in tree.best_first()),
        key=lambda item: -item[0],
    )
    sure = len(trees)
    count = paying([chance for chance, _, _ in ranked[: max(most - sure, 0)]], sure, sure, costs)
    nodes: list[list[int]] = [[] for _ in trees]
    for _, tree, node in ranked[:count]:
        nodes[tree].append(node)
    return [tree.kept(chosen) for tree, chosen in zip(trees, nodes, strict=True)]
