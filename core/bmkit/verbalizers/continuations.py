"""What may be said at one place, as a trie: choices that begin alike are read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

ROOT = -1
"""In the place of a node: what comes before all choices."""


@dataclass
class Trie:
    """Choices, each with the text behind it, and the log-probabilities that are asked for.

    A node is a token that is read behind its parent; the last token of all is only asked for, and
    no node. What several choices have in common at their beginning is there once.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """How many nodes are above each."""
    reads: list[int] = field(default_factory=list)
    """The nodes, or ROOT, at which the model's output is needed."""
    asked: list[tuple[int, int]] = field(default_factory=list)
    """What is asked for, each once: a number among `reads`, and a token."""
    choices: list[int] = field(default_factory=list)
    """The numbers of the choices in it."""
    words: list[list[int]] = field(default_factory=list)
    """By choice, which of `asked` are its tokens."""
    behind: list[list[int]] = field(default_factory=list)
    """By choice, which of `asked` are tokens behind it."""

    @property
    def depth(self) -> int:
        """Return the greatest number of nodes that follow each other."""
        return max(self.depths, default=-1) + 1

    def paths(self) -> list[list[int]]:
        """Return the nodes from the top to each of the lowest ones; one empty path without any."""
        above = set(self.parents)
        ends = [node for node in range(len(self.tokens)) if node not in above]
        return [self.path(end) for end in ends] or [[]]

    def path(self, node: int) -> list[int]:
        """Return the nodes from the top to `node`, itself included."""
        found = []
        while node != ROOT:
            found.append(node)
            node = self.parents[node]
        return found[::-1]


def tries(
    choices: Sequence[Sequence[int]],
    behind: Sequence[int] = (),
    *,
    scored: int,
    most_nodes: int,
    most_reads: int,
) -> Iterator[Trie]:
    """Yield tries of the choices, each with `behind` after it, in as few as the bounds let.

    Tokens from `scored` on are read, but not asked for: they are trained ones, which no head says.
    A trie that one choice makes larger than the bounds holds that choice alone.
    """
    grower = _Grower(scored)
    for number, choice in enumerate(choices):
        nodes, reads = grower.cost(choice, behind)
        if grower.trie.choices and (nodes > most_nodes or reads > most_reads):
            yield grower.trie
            grower = _Grower(scored)
        grower.add(number, choice, behind)
    if grower.trie.choices:
        yield grower.trie


class _Grower:
    def __init__(self, scored: int) -> None:
        self.trie, self.scored = Trie(), scored
        self.children: dict[tuple[int, int], int] = {}
        self.read_at: dict[int, int] = {}
        self.asked_at: dict[tuple[int, int], int] = {}

    def cost(self, choice: Sequence[int], behind: Sequence[int]) -> tuple[int, int]:
        """Return how many nodes and reads there would be with one choice more, at the most."""
        node, new = ROOT, 0
        text = [*choice, *behind]
        for at, token in enumerate(text[:-1]):
            if (below := self.children.get((node, token))) is None:
                new = len(text) - 1 - at
                break
            node = below
        return len(self.trie.tokens) + new, len(self.trie.reads) + new + 1

    def add(self, number: int, choice: Sequence[int], behind: Sequence[int]) -> None:
        own: list[int] = []
        after: list[int] = []
        node = ROOT
        text = [*choice, *behind]
        for at, token in enumerate(text):
            if token < self.scored:
                (own if at < len(choice) else after).append(self._ask(node, token))
            if at + 1 < len(text):
                node = self._below(node, token)
        self.trie.choices.append(number)
        self.trie.words.append(own)
        self.trie.behind.append(after)

    def _ask(self, node: int, token: int) -> int:
        trie = self.trie
        if node not in self.read_at:
            self.read_at[node] = len(trie.reads)
            trie.reads.append(node)
        key = (self.read_at[node], token)
        if key not in self.asked_at:
            self.asked_at[key] = len(trie.asked)
            trie.asked.append(key)
        return self.asked_at[key]

    def _below(self, node: int, token: int) -> int:
        trie, key = self.trie, (node, token)
        if key not in self.children:
            self.children[key] = len(trie.tokens)
            trie.tokens.append(token)
            trie.parents.append(node)
            trie.depths.append(0 if node == ROOT else trie.depths[node] + 1)
        return self.children[key]
