"""The Jacobi window of lookahead decoding: places ahead, whose tokens come right by iteration."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from bmkit.runtime.speculation.tree import Tree

CHANCE = 0.01


class Window:
    """Guesses for `width` places ahead, as they were in the last few forwards.

    A forward reads the newest iterations, each token after those of the iterations before it; what
    the model says after the newest is the next iteration, and each place's tokens, oldest to
    newest, are a phrase (lookahead decoding, arXiv 2402.02057). As part of a tree: the oldest
    iteration is a chain, and below each of its tokens hang the newer ones of the next places.
    """

    def __init__(self, width: int, levels: int, said: Sequence[int]) -> None:
        self.width, self.levels = width, levels
        self.draw = random.Random(10)
        self.said = list(said[-256:]) or [0]
        self.rows = [[self._any() for _ in range(width)]]
        self.nodes: list[list[int]] = []

    def _any(self) -> int:
        return self.draw.choice(self.said)

    def add(self, tree: Tree, at: int) -> None:
        """Hang the window below node `at`."""
        first = tree.add(self.rows[0], "window", [CHANCE] * self.width, at)
        self.nodes = [first]
        for row in self.rows[1:]:
            above = self.nodes[-1]
            self.nodes.append(
                [
                    tree.add([token], "window", [CHANCE], node)[0]
                    for token, node in zip(row, above, strict=True)
                ]
            )

    def learn(self, said: Sequence[int], moved: int) -> Iterator[list[int]]:
        """Take what the model said after each node of the tree; yield the phrases that were found.

        `moved` is by how many tokens the answer has grown.
        """
        new = [said[node] for node in self.nodes[-1]]
        full = len(self.rows) + 1 >= self.levels
        if full:
            for column in range(self.width):
                yield [*(row[column] for row in self.rows), new[column]]
        self.rows = [*(self.rows[1:] if full else self.rows), new]
        fresh = min(max(moved - 1, 0), self.width)  # a column is a place further on by itself
        if fresh:
            self.rows = [[*row[fresh:], *(self._any() for _ in range(fresh))] for row in self.rows]
