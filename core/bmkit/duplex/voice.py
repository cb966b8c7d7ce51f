"""What the model says: whether it stays silent, and which token comes next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmkit.data.slices.layout import SPEAKS, Layout
from bmkit.runtime import sampling
from bmkit.runtime.row import require_finite

DRAWS = 4096
"""Draws of one slice: the noise of each has a number of its own."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class Chooser:
    """Chooses by logits [vocabulary]. Control tokens never come out as text."""

    def __init__(self, layout: Layout, how: Sampling, special: Sequence[int] = ()) -> None:
        self.layout, self.how = layout, how
        self.never = sorted({*layout.control, *special} - {layout.end})
        self.marks = [m for m in (layout.user, layout.agent) if len(m) > 1]
        self.steps: Any = None
        if how.temperature > 0:
            self.steps = sampling.processors(
                [sampling.row_seed(how.seed, 0)],
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                min_p=how.min_p,
            )

    def silence(self, logits: Tensor) -> tuple[float, bool]:
        """Return how likely the model finds silence, and whether it is the likeliest.

        Raises InputError if the logits are no numbers.
        """
        silent = list(self.layout.silent)
        total = float(logits.logsumexp(-1))
        require_finite(total)
        share = float((logits[silent].logsumexp(-1) - total).exp())
        others = self._sayable(logits, first=True, said=())
        if self.layout.states:
            others = logits[self._speaking()]
        return share, bool(logits[silent].max() >= others.max())

    def _speaking(self) -> list[int]:
        return [token for name, token in self.layout.states if name in SPEAKS]

    def state(self, logits: Tensor, *, speaks: bool) -> int | None:
        """Return the likeliest state in which the agent speaks, or doesn't; None without states."""
        if not self.layout.states:
            return None
        among = self._speaking() if speaks else list(self.layout.silent)
        return among[int(logits[among].argmax())]

    def _sayable(self, logits: Tensor, *, first: bool, said: Sequence[int]) -> Tensor:
        found = logits.clone()
        found[[token for token in self.never if token < len(found)]] = -torch.inf
        if first:
            found[self.layout.end] = -torch.inf
        for mark in self.marks:  # of several tokens: the last one doesn't follow the others
            if tuple(said[-(len(mark) - 1) :]) == mark[:-1]:
                found[mark[-1]] = -torch.inf
        return found

    def token(self, logits: Tensor, said: Sequence[int], *, number: int) -> int:
        """Return what comes behind `said`, the end among it once there is something.

        Draws depend on the seed, the `number` of the slice and the place in it alone.
        """
        found = self._sayable(logits, first=not said, said=said)
        if self.steps is not None:
            self.steps[-1].start = -(number * DRAWS + len(said))
            none = torch.empty((1, 0), dtype=torch.long)
            found = self.steps(none, found[None])[0]
        return int(found.argmax())

    def draw(self, number: int) -> float:
        """Return a number from [0, 1) for a slice's decision."""
        return sampling.row_seed(self.how.seed, 2 * number + 1) / 2**63
