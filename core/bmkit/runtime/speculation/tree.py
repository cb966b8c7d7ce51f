"""Guesses at what follows, as a tree: beginnings that they share are verified once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Tree:
    """Nodes in the order they were added, a parent always before its children.

    Node 0 is the last token that is known, which the model has yet to read. `chances` are the
    probabilities that a node's token, and all above it, will turn out to be what the model says.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    sources: list[str] = field(default_factory=lambda: [""])
    chances: list[float] = field(default_factory=lambda: [1.0])
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])

    @classmethod
    def of(cls, token: int) -> Tree:
        """Return a tree that holds nothing but the token that is to be read."""
        return cls([token])

    def __len__(self) -> int:
        """Return the number of nodes, the root included."""
        return len(self.tokens)

    def add(
        self, path: Sequence[int], source: str, chances: Sequence[float], at: int = 0
    ) -> list[int]:
        """Add a path of tokens below node `at`, and return its nodes.

        `chances` are those of each token, given that the one before it was right. A node that is
        there already keeps its source, and the better of both chances.
        """
        nodes = []
        for token, chance in zip(path, chances, strict=True):
            whole = chance * self.chances[at]
            found = self.children[at].get(token)
            if found is None:
                found = len(self.tokens)
                self.children[at][token] = found
                self.tokens.append(token)
                self.parents.append(at)
                self.depths.append(self.depths[at] + 1)
                self.sources.append(source)
                self.chances.append(whole)
                self.children.append({})
            else:
                self.chances[found] = max(self.chances[found], whole)
            nodes.append(found)
            at = found
        return nodes

    def best_first(self) -> list[int]:
        """Return all nodes but the root, the likeliest first, parents before children."""
        return sorted(range(1, len(self)), key=lambda n: (-self.chances[n], self.depths[n], n))

    def kept(self, nodes: Sequence[int]) -> Tree:
        """Return the tree of the root and `nodes`, among which all their parents must be."""
        found = Tree.of(self.tokens[0])
        where = {0: 0}
        for node in sorted(nodes):
            parent = self.parents[node]
            step = self.chances[node] / self.chances[parent] if self.chances[parent] else 0.0
            where[node] = found.add([self.tokens[node]], self.sources[node], [step], where[parent])[
                0
            ]
        return found

    def sees(self) -> np.ndarray:
        """Return bool [nodes, nodes]: each row sees itself and what is above it."""
        count = len(self)
        found = np.eye(count, dtype=np.bool_)
        for node in range(1, count):
            found[node] |= found[self.parents[node]]
        return found

    def path(self, node: int) -> list[int]:
        """Return the nodes from below the root down to `node`."""
        found = []
        while node > 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def leaves(self) -> list[int]:
        """Return the nodes without children."""
        return [n for n, below in enumerate(self.children) if not below]

    @property
    def is_chain(self) -> bool:
        """Tell whether no node has two children: then a causal mask is enough."""
        return all(len(below) <= 1 for below in self.children)
